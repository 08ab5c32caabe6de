"""What becomes of a process that ends without a result."""

import pytest

from lisatune.compare import processes


@pytest.mark.parametrize(
    ("code", "output", "reason"),
    [
        (
            1,
            "Traceback (most recent call last):\nlisatune: KeyError: 3 (a defect)",
            r"KeyError: 3 \(a defect\); its log shows the traceback",
        ),
        (2, "noise\nlisatune: error: loss nan; lower it\nmore\n", "loss nan; lower it"),
        (-9, "", "its process was ended by SIGKILL, as the system does when memory runs out"),
        (-11, "", "its process was ended by SIGSEGV"),
        (1, "Traceback", "its process ended with exit code 1 and without a message"),
    ],
)
def test_the_reason_of_a_failure_is_the_processs_own(code: int, output: str, reason: str) -> None:
    with pytest.raises(processes.FailedError, match=reason):
        processes.check_exit(code, output)


@pytest.mark.parametrize("code", [130, 143])
def test_a_run_that_was_stopped_from_outside_has_not_failed(code: int) -> None:
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step 3.*; give the same command to continue"):
        processes.check_exit(code, "lisatune: stopped after step 3, which is saved\n")

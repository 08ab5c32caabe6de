r"""LISA: Layerwise Importance Sampled AdamW (Pan et al., arXiv 2403.17919).

LoRA changes embedding and head far more than the blocks between them (section 3.1). LISA imitates that in
the space of all parameters: layer l trains in a period with probability

    p_l = w̃_l / w_l                                                     (section 3.2)

where w̃_l and w_l are the mean weight norms that LoRA and full fine-tuning reach. With embedding and head at
ratio 1 and blocks at a small constant ratio, over N blocks of which γ train on average,

    p = { 1, γ/N, γ/N, …, γ/N, 1 }.

Algorithm 1, with K the period and T the number of optimizer steps:

    for i in 0 … T/K - 1:
        freeze all layers except embedding and head
        draw γ of the N blocks and thaw them
        run AdamW for K steps

A frozen block has no gradient and no optimizer state, and backward keeps no activations for its weights, so
peak memory is that of the ends and γ blocks. Hooks on the optimizer do the work:

    step pre-hook           take the fingerprints at the start of a period; set the learning rates of the step
    step post-hooks         put them back; count; after a period prove, draw, freeze, thaw, release state
    state-dict hooks        save the position inside the period, so that resume is exact

Longer than 400 lines: the algorithm, its hooks and the state that they save belong together.
"""

import sys
import weakref
from collections.abc import Mapping, Sequence, Set
from contextlib import ExitStack
from numbers import Integral
from typing import Any, Literal, Self, get_args

from torch import nn
from torch.optim import Optimizer

from lisatune.distributed import ranks
from lisatune.distributed.shards import reshard
from lisatune.lisa.budget import Budget
from lisatune.lisa.checks import (
    as_whole,
    check_kinds,
    check_layers,
    check_parameters,
    is_copied,
    refuse_compiled_blocks,
    refuse_first_fsdp,
    refuse_frozen,
    refuse_reordered,
    refuse_replaced,
    refuse_second,
    unwrap_ddp,
    unwrap_optimizer,
    warn_of_compiling,
    warn_of_early_state,
    warn_of_rounding,
    warn_of_untrained_blocks,
)
from lisatune.lisa.correction import Correction, FrozenCorrection
from lisatune.lisa.draws import choose_period, count_visits, draw_blocks, simulate_draws
from lisatune.lisa.ends import Ends, EndsPolicy
from lisatune.lisa.exchange import GradientExchange
from lisatune.lisa.frozen_state import FrozenState, StatePolicy
from lisatune.lisa.frozen_weights import find_frozen_weights
from lisatune.lisa.group_state import GroupState
from lisatune.lisa.importance import Spectrum, choose_sampler
from lisatune.lisa.low_rank import LowRankCorrection
from lisatune.lisa.moved_share import MovedShare
from lisatune.lisa.other_steps import OtherSteps
from lisatune.lisa.proof import Proof, Verify, describe_proof
from lisatune.lisa.rates import Scaling, StepRates, mark_as_scaled
from lisatune.lisa.samplers import Independent, Sampler
from lisatune.lisa.schedule import BlockSchedule, find_extreme_draws
from lisatune.lisa.sign import SignCorrection
from lisatune.lisa.spectrum import measure_spectra
from lisatune.lisa.statistics import PER_STEP, Collector, watch
from lisatune.nn.adapter import merge_adapters
from lisatune.nn.blocks import watch_compiling
from lisatune.nn.coded import Masters
from lisatune.nn.layers import LayerMap, find_layers
from lisatune.nn.units import UnitMap, divide_blocks
from lisatune.optim.adamw import AdamW
from lisatune.optim.meter import host_state, state_bytes, tensors_bytes

__all__ = ["LISA"]

Unit = Literal["block", "module", "sized"]
"""What is drawn; see `LISA`."""

MOST_PERIODS = 1000
"""Periods whose draws the memory plan looks at: enough for every draw that is likely."""

_attached: "weakref.WeakSet[Optimizer]" = weakref.WeakSet()

_detached: "weakref.WeakSet[Optimizer]" = weakref.WeakSet()
"""Optimizers that a LISA has left, and with them the state of what trained."""

_drives: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[LISA]]" = weakref.WeakKeyDictionary()
"""Which LISA drives a model. A model's hooks must not hold it: they are copied and saved with the model."""


class LISA(BlockSchedule):
    """Train the ends and a few drawn blocks at a time with an ordinary optimizer.

    Attach it after building the optimizer over all parameters; the loop calls nothing. Only real optimizer
    steps count: micro-steps, steps that a loss scaler skips, and evaluation do not.

    Args:
        model: the model that the optimizer trains.
        optimizer: any torch optimizer, also in Accelerate's wrapper, whose param groups hold every parameter
            of blocks and ends.
        active: γ, blocks that train at once, 0 <= γ <= N. γ = N is full fine-tuning, γ = 0 trains the ends.
        period: K, optimizer steps between two draws, or "auto": as long as possible, at most 50, such that
            every block trains twice in `total_steps`.
        unit: "block": γ blocks. "sized": blocks of different size, as many at a time as γ average blocks
            have parameters (`lisatune.lisa.budget`). "module": each linear layer of a block is drawn on its
            own, under the same budget; see `lisatune.nn.units`. Wherever LISA counts blocks, it counts these
            units then.
        sampler: "permutation", "uniform" (the paper's), "window" (γ neighbouring blocks), "ascending",
            "descending" (in order), "gradient", "misa" or "spectrum" (by what is measured of each block, see
            `lisatune.lisa.importance`), N probabilities for γ weighted distinct blocks, or a
            `lisatune.lisa.samplers.Sampler` such as `Independent`, which decides γ itself. A sampler may draw
            by what training has measured of each block (`Sampler.reads`).
        seed: of the draws, which are equal on every rank and use no global RNG.
        state: what happens to the optimizer state of a block that freezes.
            `drop`: released, but a block that is drawn again at once keeps it.
            `reset`: all state, also of the ends, is cleared at every draw, as in the paper's published runs.
            `cpu`: moved to host memory, and back when the block thaws.
            `second_moment`: as `cpu` for all but AdamW's first moment, which starts at 0. Optimizers without
            a second moment (`exp_avg_sq`) start anew.
            `keep`: never released, which costs the memory that LISA saves; for comparisons.
        ends: which of embedding, head and final norm train in which periods, as text or `EndsPolicy`; see
            `lisatune.lisa.ends`. The optimizer's groups must have the same state formats (8bit, factored,
            cpu, rows).
        warmup: steps at the start of a period over which the learning rate of newly thawed blocks, and of
            ends under every:M, ramps up: i/(warmup + 1) at step i, 0 <= warmup < period.
        lr_scaling: in a step a block's learning rate is its group's times 1/√π ("sqrt"), 1/π ("inverse") or
            1 ("none", the paper's), π its chance to train; groups keep their rates (`lisatune.lisa.rates`).
        frozen_weights: what the device holds of a frozen block: "exact" weights, or codes of them, "int8" or
            "nf4" (needs bitsandbytes), or "mixed" of both, while `masters` keeps the exact ones. See
            `lisatune.lisa.frozen_weights`. Frozen ends are int8.
        masters: where exact weights of coded blocks are kept. Default: host memory. `lisatune.DiskMasters`
            keeps them in a file.
        correction: "none", "lora", "sign" or a `lisatune.Correction`: how frozen blocks learn a little in
            every step. The adapters of "lora" are not parameters of the model, and are trained here, in the
            optimizer's hooks; `model.state_dict()` gives merged weights. See `lisatune.lisa.correction`.
        verify: "sample" proves from a moving window of every parameter that the drawn blocks moved and no
            other did, "full" from every element, "off" not at all. See `lisatune.lisa.proof`.
        total_steps: optimizer steps of the whole run, for period="auto" and the coverage warning.
        layers: blocks and ends, if `find_layers(model)` cannot find them.

    Raises:
        ValueError: an argument is out of range or does nothing, the optimizer lacks a parameter of a block or
            end, or the sampler reads what cannot be measured or draws no numbers of blocks.
        TypeError: the optimizer is no torch optimizer, or is LBFGS or DeepSpeed's, or the model FSDP1's.
        RuntimeError: a LISA is attached to the optimizer already, or the ranks draw other blocks or hold
            other weights. `optimizer.step()` raises it if param groups, or parameters of the model, were
            replaced, or something else froze a parameter that trains.
        ProofError: raised by `optimizer.step()` if the wrong weights trained.

    Example:
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        >>> lisa = LISA(model, optimizer, active=2, period=10)
        >>> for batch in loader:
        ...     model(**batch).loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        active: int = 2,
        unit: Unit = "block",
        period: int | Literal["auto"] = 10,
        sampler: str | Sequence[float] | Sampler = "permutation",
        seed: int = 0,
        state: StatePolicy = "drop",
        ends: str | EndsPolicy = "train",
        warmup: int = 0,
        lr_scaling: Scaling = "sqrt",
        frozen_weights: Literal["exact", "int8", "mixed", "nf4"] = "exact",
        masters: Masters | None = None,
        correction: str | Correction = "none",
        verify: Verify = "sample",
        total_steps: int | None = None,
        layers: LayerMap | None = None,
    ) -> None:
        check_kinds(model, layers, masters)
        active, seed, warmup = as_whole("active", active), as_whole("seed", seed), as_whole("warmup", warmup)
        total_steps = None if total_steps is None else as_whole("total_steps", total_steps)
        _check_choice("state", state, get_args(StatePolicy))
        _check_choice("unit", unit, get_args(Unit))
        policy = EndsPolicy.parse(ends)
        corrects = Correction.parse(correction)
        _check_choice("verify", verify, get_args(Verify))
        _check_choice("lr_scaling", lr_scaling, get_args(Scaling))
        self._model = model = unwrap_ddp(model)
        refuse_first_fsdp(model)
        reshard(model)
        self._optimizer = optimizer = unwrap_optimizer(model, optimizer)
        refuse_second(model, optimizer, _attached)
        merge_adapters(model)  # those of a copy, which nobody trains
        layers = find_layers(model) if layers is None else layers
        check_layers(layers, model)
        if unit == "module":
            refuse_compiled_blocks(model)
        self.layers: LayerMap = divide_blocks(layers, model) if unit == "module" else layers
        named = self.layers.block_parameters(model)
        self._blocks = [tuple(p for p in block.values() if p.requires_grad) for block in named]
        self._sizes = [sum(p.numel() for p in block) for block in self._blocks]
        self._budget = None if unit == "block" else Budget.of_blocks(self._sizes, active, layers.num_blocks)
        self.sampler = choose_sampler(sampler, active, self._sizes, self._budget)
        self.unit, self.seed, self.state, self.verify = unit, seed, state, verify
        self.warmup, self.lr_scaling = warmup, lr_scaling
        self.period: int = _choose_period(period, self.sampler, seed, total_steps)
        if not 0 <= warmup < self.period:
            raise ValueError(f"warmup must be >= 0 and below period={self.period}, got {warmup}")

        check_parameters(self.layers, model, optimizer)
        warn_of_rounding(model, optimizer)
        frozen = [p for block in named for p in block.values() if not p.requires_grad]
        self._ends = Ends(policy, model, self.layers)
        always = bool(self._ends.parameters) and policy.trains != "none" and policy.every == 1
        if not always and (active == 0 or isinstance(self.sampler, Independent)):
            what = f"ends={str(policy)!r}" if self._ends.parameters else "a model without ends that train"
            raise ValueError(
                f"{what} needs active >= 1 and a sampler other than Independent, or a period might train "
                "nothing"
            )
        self._never_train = (*self._ends.resting, *frozen, *self.layers.frozen_parameters(model).values())
        self._ends.check_state(optimizer)
        if optimizer not in _detached:
            warn_of_early_state(optimizer, self._ends.parameters, self._blocks)
        self._param_groups = optimizer.param_groups
        self._frozen_state, self._group_state = FrozenState(optimizer, state), GroupState(optimizer, state)
        self._saved: dict[str, Any] = {}
        self._saved_state: dict[int, Any] = {}

        self.steps_done = 0
        """Optimizer steps that were made."""
        self.visits = [0] * self.layers.num_blocks
        """In how many periods each block has trained, the current one included once it has made a step."""
        self.active_blocks: tuple[int, ...] = ()
        """Blocks that train in the current period, in rising order."""
        self.previous_blocks: tuple[int, ...] = ()
        """Blocks of the period before; empty in the first period."""
        self.ends_train = False
        """Whether the ends (under `head`: all but the embedding) train in the current period."""

        self._warned_of_compiling = self._has_loaded = False
        with ExitStack() as undo:  # an error leaves nothing in model and optimizer for the next LISA to find
            self._frozen_weights = find_frozen_weights(model, layers, frozen_weights, masters, undo)
            self._collector = self._make_collector(named) if self.sampler.reads else None
            self._correction = None if corrects is None else self._make_correction(corrects)
            if self._correction is not None:
                undo.callback(self._correction.detach, model)
            self._moved = MovedShare(optimizer)
            self._proof = None if verify == "off" else self._make_proof(verify)
            self._flags = {
                p: p.requires_grad
                for p in (*self._ends.parameters, *self._never_train, *sum(self._blocks, ()))
            }
            self._named = {name: p for name, p in model.named_parameters() if p in self._flags}
            self._num_ranks = ranks.count()
            self._exchange = self._make_exchange() if is_copied(model) else None
            if self._exchange is not None:
                undo.callback(self._exchange.detach)
            chances = [1.0] * len(self._blocks) if lr_scaling == "none" else self._find_chances()
            self._rates = StepRates(optimizer, self._blocks, chances, lr_scaling, warmup)
            undo.callback(self._rates.detach)
            self._attach()
            undo.pop_all()
            undo.callback(self.detach)
            self._draw()
            if total_steps is not None:
                counts = self.planned_visits(total_steps)
                warn_of_untrained_blocks(self._find_chances(), counts, total_steps, self.period, self.word)
            undo.pop_all()

    # ---- what __init__ builds

    def _make_collector(self, named: Sequence[Mapping[str, nn.Parameter]]) -> Collector:
        """Collect what the sampler reads; ValueError if an update in backward makes that impossible."""
        exact = nn.Parameter.detach if self._frozen_weights is None else self._frozen_weights.exact
        collector = Collector(
            self._blocks,
            self.sampler.reads,
            exact,
            keeps=self.sampler.keeps,
            spectra=lambda: measure_spectra(named, exact),
            records=self.sampler.records,
        )
        watch(self._optimizer, collector)
        lost = [name for name in self.sampler.reads if name in PER_STEP]
        if lost and isinstance(self._optimizer, AdamW) and self._optimizer.in_backward is not None:
            raise ValueError(
                f"the sampler reads {' and '.join(lost)}, which cannot be measured with update in backward, "
                "because gradients are gone after it; update in step()"
            )
        return collector

    def _make_correction(self, correction: Correction) -> FrozenCorrection:
        """Add what corrects the frozen blocks to the model; ValueError if there are none."""
        chances = self.sampler.inclusion()
        if min(chances) >= 1:
            raise ValueError(
                f"correction {correction.kind} corrects frozen blocks, and all {len(chances)} blocks train "
                "in every step; lower active, or use correction none"
            )
        if correction.kind == "sign":
            return SignCorrection(self._model, self._blocks, self._optimizer, correction, seed=self.seed)
        if correction.blocks == "above" and max(chances) <= 0:
            raise ValueError("correction_blocks above needs blocks that train, and none does; use all")
        return LowRankCorrection(self._model, self.layers, self._optimizer, correction, seed=self.seed)

    def _make_exchange(self) -> GradientExchange:
        return GradientExchange(self._model, self._flags, self.trainable_parameters, self._optimizer)

    def _make_proof(self, verify: Literal["sample", "full"]) -> Proof:
        """Make a proof of the layers by name: blocks, ends, what never trains, adapters of a correction."""
        names = [self._name(i) for i in range(len(self._blocks))]
        adapters = {} if self._correction is None else self._correction.layers()
        layers: dict[str, Sequence[nn.Parameter]] = {
            **dict(zip(names, self._blocks, strict=True)),
            "ends": self._ends.parameters,
            "frozen part": (*self._never_train, *self._ends.other_rows),
            **adapters,
        }
        read = None if self._frozen_weights is None else self._frozen_weights.read
        return Proof(layers, verify, self._moved, counted=names, read=read)

    def _attach(self) -> None:
        """Hook into the optimizer and the model; `detach` undoes it."""
        model, optimizer = self._model, self._optimizer
        self._other_steps = OtherSteps(optimizer, self._flags)
        _attached.add(optimizer)
        _drives[model] = weakref.ref(self)
        self._ends.attach()
        self._hooks = [
            watch_compiling(model),
            model.register_load_state_dict_post_hook(_tell_of_loading),  # type: ignore[no-untyped-call]
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_pre_hook(self._rates.restore),
            optimizer.register_state_dict_post_hook(self._add_to_state_dict),
            optimizer.register_load_state_dict_pre_hook(self._check_saved),
            optimizer.register_load_state_dict_post_hook(self._take_saved),
        ]
        if type(optimizer).load_state_dict is not Optimizer.load_state_dict:
            optimizer.load_state_dict = self._load_state_dict  # type: ignore[method-assign]

    # ---- what users read

    @property
    def period_index(self) -> int:
        """Number of the current period, from 0."""
        return self.steps_done // self.period

    @property
    def periods_proven(self) -> int:
        """Complete periods after which the drawn blocks had moved and all others were bit-identical."""
        return 0 if self._proof is None else self._proof.periods

    @property
    def moved_share(self) -> float | None:
        """Mean share of the drawn blocks' numbers that a whole period changed, estimated from a sample."""
        return self._moved.share

    @property
    def ends_rest(self) -> bool:
        """Whether there are periods in which nothing before the blocks trains."""
        return self._ends.policy.trains in ("head", "none") or self._ends.policy.every > 1

    @property
    def idle_row_numbers(self) -> int:
        """How many numbers of trainable weights never move, because only some of the rows train."""
        return self._ends.num_idle

    @property
    def coverage_is_exact(self) -> bool:
        """Whether `planned_visits` is exact; False for a sampler that reads statistics."""
        return not self.sampler.reads

    def describe(self) -> dict[str, Any]:
        """Return the number of the current period and its blocks; of units also the blocks they are in."""
        drawn: dict[str, Any] = {"period": self.period_index, "active_blocks": self.active_blocks}
        if isinstance(self.layers, UnitMap):
            of_block = self.layers.of_block
            drawn["active_units"] = self.active_blocks
            drawn["active_blocks"] = tuple(sorted({of_block[unit] for unit in self.active_blocks}))
        return drawn

    def summarize(self) -> dict[str, Any]:
        """Return each block's visits, how far the run is proven, in words, and the share that moved."""
        share = {} if self.moved_share is None else {"moved_share": round(self.moved_share, 4)}
        resting, rest = self.layers.num_blocks - len(self.active_blocks), self.steps_done % self.period
        names = {"units": list(self.layers.blocks)} if self.unit == "module" else {}
        says = "" if self._correction is None else self._correction.says
        proof = describe_proof(self._proof, resting, rest, says, self.word)
        return {"visits": self.visits, "proof": proof, **names, **share}

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return what trains in this period: the ends, the active blocks, and adapters of a correction."""
        active = [p for block in self.active_blocks for p in self._blocks[block]]
        active += [] if self._correction is None else self._correction.parameters()
        return [*self._ends.parameters, *active] if self.ends_train else active

    def lr_factor(self, block: int) -> float:
        """Return what the learning rate of a block's param group is multiplied by in a step."""
        rates = self.sampler.rates(self.steps_done)
        return self._rates.factor(block) if rates is None else rates[block]

    def state_bytes(self) -> int:
        """Count the bytes of optimizer state on the training device; see `host_bytes` for the rest."""
        beside = None if self._correction is None else self._correction.optimizer
        own = 0 if beside is None else state_bytes(beside)
        return own + state_bytes(self._optimizer) - tensors_bytes(host_state(self._optimizer))

    def host_bytes(self) -> int:
        """Count the bytes in host memory: optimizer state and exact weights of frozen blocks."""
        weights = 0 if self._frozen_weights is None else self._frozen_weights.host_bytes()
        return weights + self._frozen_state.nbytes() + tensors_bytes(host_state(self._optimizer))

    def planned_visits(self, total_steps: int) -> tuple[int, ...]:
        """Count in how many periods of a run of `total_steps` optimizer steps each block will train.

        Draws are known beforehand, so this is exact. For a sampler that reads statistics it is a simulation
        in which all blocks have equal norms.
        """
        return count_visits(self.sampler, seed=self.seed, periods=-(-total_steps // self.period))

    def possible_draws(self, total_steps: int) -> set[tuple[int, ...]]:
        """Return the draws of a run; for a sampler that reads statistics, the costliest possible ones."""
        if self.sampler.reads:
            most = None if self._budget is None else self._budget.most
            return find_extreme_draws(self._sizes, len(self.active_blocks), most=most)
        periods = min(-(-total_steps // self.period), MOST_PERIODS)
        return set(simulate_draws(self.sampler, seed=self.seed, periods=periods))

    def hold(self, blocks: Sequence[int]) -> None:
        """Train these blocks from now on, to plan or measure what they cost. No later step draws.

        The current period is not proven. There is no way back: attach a new LISA to train.

        Args:
            blocks: indices of blocks, in any order.
        """
        self.active_blocks = tuple(sorted(blocks))
        self.period = sys.maxsize
        if self._proof is not None:
            self._proof.forget()
        self._set_trainable()

    def check(self) -> None:
        """Prove the steps of an incomplete period, at the end of a run.

        Raises:
            ProofError: the wrong weights trained, or another optimizer has made the run's steps.
            RuntimeError: parameters of the model were replaced.
        """
        self._other_steps.check(self.steps_done)
        refuse_replaced(self._model, self._named)
        if self._proof is not None and self._proof.is_open and self.steps_done % self.period:
            self._proof.end(still_open=True)

    def settle(self) -> None:
        """Merge the adapters of a correction into the weights, once: they are zero from now on."""
        if self._correction is not None:
            self._correction.merge()

    def detach(self) -> None:
        """Remove every hook, and give every parameter the `requires_grad` that it had before.

        Adapters of a correction are merged into the weights, once, and removed. A second call does nothing.
        """
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if type(self._optimizer).load_state_dict is not Optimizer.load_state_dict:
            vars(self._optimizer).pop("load_state_dict", None)
        self._other_steps.detach()
        self._rates.detach()
        self._frozen_state.detach()
        if self._frozen_weights is not None:
            self._frozen_weights.detach(self._model)
        if self._correction is not None:
            self._correction.detach(self._model)
        self._ends.detach()
        if self._exchange is not None:
            self._exchange.detach()
        for parameter, flag in self._flags.items():
            parameter.requires_grad_(flag)
        _attached.discard(self._optimizer)
        _detached.add(self._optimizer)

    def __reduce__(self) -> Any:
        """Refuse a copy: torch copies an optimizer without its hooks, so the copy would draw nothing."""
        raise TypeError(
            "a LISA cannot be copied or pickled, because copies of an optimizer have no hooks; attach a new "
            "LISA to a new optimizer over the copied model, all of which requires grad, and load "
            "optimizer.state_dict() into it"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Check the run and detach; after an exception only detach."""
        try:
            if kind is None:
                self.check()
        finally:
            self.detach()

    # ---- Algorithm 1

    def _draw(self) -> None:
        """Draw this period's blocks, thaw them, and freeze all others."""
        self._warned_of_compiling = self._warned_of_compiling or warn_of_compiling(self._model)
        statistics = None if self._collector is None else self._collector.statistics(self.visits)
        self.previous_blocks = self.active_blocks
        self.active_blocks = draw_blocks(
            self.sampler, self.period_index, seed=self.seed, statistics=statistics
        )
        ranks.check_equal(
            f"the blocks drawn for period {self.period_index}", (self.active_blocks, self.steps_done)
        )
        if self.state == "reset":
            self._frozen_state.reset()
        self._frozen_state.forget(self._ends.rows_of)
        self._set_trainable()

    def _set_trainable(self) -> None:
        reshard(self._model)
        if self._num_ranks > 1 and is_copied(self._model) != (self._exchange is not None):
            raise RuntimeError(
                "fully_shard has divided the model after LISA was attached; divide it first, then build the "
                "optimizer, then attach LISA"
            )
        self.ends_train = self._ends.policy.trains_in(self.period_index)
        moving = self._find_moving()
        if not moving and self._correction is None:
            raise ValueError(
                f"{type(self.sampler).__name__} drew no blocks for period {self.period_index}, in which the "
                f"ends rest too (ends={str(self._ends.policy)!r}), so nothing would train; draw at least one"
            )
        # Freeze first: the other way round, the blocks of two periods would be on the device at once.
        for parameter in self._flags:
            if parameter not in moving:
                self._freeze(parameter)
        for parameter in self._flags:
            if parameter in moving:
                self._thaw(parameter)
        if self._correction is not None:
            self._correction.train(self.active_blocks)
        if self._collector is not None:
            self._collector.make_room(self.active_blocks)

    def _find_moving(self) -> set[nn.Parameter]:
        """Return the model's parameters that train in this period."""
        moving = {p for block in self.active_blocks for p in self._blocks[block]}
        return moving.union(self._ends.parameters) if self.ends_train else moving

    def _freeze(self, parameter: nn.Parameter) -> None:
        parameter.requires_grad_(False)
        # The gradient must go as well: AdamW moves every weight that has one, `requires_grad` or not.
        parameter.grad = None
        self._frozen_state.freeze(parameter)
        if self._frozen_weights is not None:
            self._frozen_weights.freeze(parameter)

    def _thaw(self, parameter: nn.Parameter) -> None:
        if self._frozen_weights is not None:
            self._frozen_weights.thaw(parameter)
        parameter.requires_grad_(True)
        self._frozen_state.thaw(parameter)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        reshard(self._model)  # else forward would read ends that an evaluation has left whole
        if ranks.count() != self._num_ranks:
            raise RuntimeError(
                f"there are {ranks.count()} ranks, and {self._num_ranks} when LISA was attached; start the "
                "process group first (init_process_group, or Accelerator), then attach LISA"
            )
        if self.steps_done % self.period == 0 or self._has_loaded:
            refuse_first_fsdp(self._model)
            refuse_replaced(self._model, self._named)
            self._has_loaded = False
        refuse_frozen(self._find_moving(), self._named)
        if self._exchange is not None:
            self._exchange.before_step()
        if optimizer.param_groups is not self._param_groups:
            raise RuntimeError(
                f"the param groups of {type(optimizer).__name__} were replaced, but not by its "
                "load_state_dict, so LISA does not know its position; load states with load_state_dict"
            )
        if self._proof is not None and not self._proof.is_open:
            self._proof.begin(self.period_index, self._name_moving(), self._name_unproven())
        if self._collector is not None:
            self._collector.before_step(self.active_blocks)
        self._rates.restore()  # a step that raised has left its rates behind
        if (rates := self.sampler.rates(self.steps_done)) is not None:
            self._rates.set_factors(rates)
        self._group_state.before_step(ends_period=(self.steps_done + 1) % self.period == 0)
        self._rates.apply(self.steps_done % self.period, self._find_thawed())

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # A loss scaler also calls fused optimizers for steps that it skips, and sets `found_inf` to say so.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return
        if self._proof is not None:
            own = () if self._correction is None else self._correction.groups()
            self._proof.saw_step([*optimizer.param_groups, *own], self._find_updated())
        if self._correction is not None:
            self._correction.step()
        if self._collector is not None:
            self._collector.after_step(self.active_blocks)
        if self.steps_done % self.period == 0:
            for block in self.active_blocks:
                self.visits[block] += 1
        self.steps_done += 1
        self._group_state.after_step()
        if self.steps_done % self.period == 0:
            if self._exchange is not None:
                what = f"the weights that trained in period {self.period_index - 1}"
                self._exchange.compare(what, self.trainable_parameters())
            if self._proof is not None:
                self._proof.end()
                if self._frozen_weights is not None:
                    self._frozen_weights.prove(self.period_index - 1)
            if self._collector is not None:
                self._collector.end_period(self.active_blocks)
            self._draw()

    def _find_chances(self) -> Sequence[float]:
        """Return each block's chance to train in a period."""
        if isinstance(self.sampler, Spectrum) and self._collector is not None:
            return self.sampler.inclusion(self._collector.statistics(()))
        return self.sampler.inclusion()

    def _find_thawed(self) -> list[nn.Parameter]:
        """Return parameters of blocks that were frozen or lost their state, and of ends that may rest."""
        stayed = () if self.period_index == 0 or self.state == "reset" else self.previous_blocks
        thawed = [p for block in self.active_blocks if block not in stayed for p in self._blocks[block]]
        ends_thaw = self.ends_train and self._ends.policy.every > 1
        return [*thawed, *self._ends.parameters] if ends_thaw else thawed

    # ---- proof

    def _name_moving(self) -> set[str]:
        """Return the names of the layers that train in this period."""
        moving = {self._name(i) for i in self.active_blocks} | ({"ends"} if self.ends_train else set())
        return moving if self._correction is None else moving | self._correction.moving(self.active_blocks)

    def _name_unproven(self) -> set[str]:
        """Return the names of the layers that may move or not."""
        if self._correction is None or not self._correction.moves_frozen:
            return set()
        return {self._name(i) for i in range(len(self._blocks)) if i not in self.active_blocks}

    def _name(self, index: int) -> str:
        return self.layers.blocks[index] if self.unit == "module" else f"block {index}"

    def _weights_were_loaded(self) -> None:
        """Prove only what follows: `load_state_dict` may have replaced weights of frozen blocks."""
        self._has_loaded = True
        if self._proof is not None:
            self._proof.forget()

    def _find_updated(self) -> Set[nn.Parameter]:
        """Return the parameters that backward has updated; their gradients are gone."""
        if isinstance(self._optimizer, AdamW) and self._optimizer.in_backward is not None:
            return self._optimizer.in_backward.updated
        return frozenset()

    # ---- save and resume

    def _collect_settings(self) -> dict[str, Any]:
        return {
            "unit": self.unit,
            "blocks": self.layers.num_blocks,
            "sampler": repr(self.sampler),
            "period": self.period,
            "seed": self.seed,
            "state": self.state,
            "ends": str(self._ends.policy),
            "warmup": self.warmup,
            "lr_scaling": self.lr_scaling,
            "correction": "none" if self._correction is None else str(self._correction.correction),
        }

    def _name_held(self) -> list[str]:
        """Name the optimizer's parameters in its order; one that is not the model's has the name ""."""
        names = {p: name for name, p in self._named.items()}
        return [names.get(p, "") for group in self._optimizer.param_groups for p in group["params"]]

    def _add_to_state_dict(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict["lisa"] = {
            "steps_done": self.steps_done,
            "active_blocks": list(self.active_blocks),
            "previous_blocks": list(self.previous_blocks),
            "visits": list(self.visits),
            "periods_proven": self.periods_proven,
            "moved": [self._moved.total, self._moved.periods],
            "parameters": self._name_held(),
            "settings": self._collect_settings(),
        }
        if self._collector is not None:
            state_dict["lisa"]["statistics"] = self._collector.state_dict()
        if self._correction is not None:
            state_dict["lisa"]["correction"] = self._correction.state_dict()
        self._frozen_state.add_to(state_dict["state"])

    def _check_saved(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        if "lisa" not in state_dict:
            raise ValueError(
                "this optimizer state was saved without LISA, so which blocks were training is unknown; "
                "load it before attaching LISA to start LISA from it"
            )
        self._rates.restore()
        saved = state_dict["lisa"]
        # Older versions did not scale, did not correct, and drew blocks.
        older = {"lr_scaling": self.lr_scaling, "correction": "none", "unit": "block"}
        settings = {**older, **saved["settings"]}
        differing = [
            f"{key}: saved {settings.get(key)}, now {value}"
            for key, value in self._collect_settings().items()
            if settings.get(key) != value
        ]
        if differing:
            raise ValueError(
                f"LISA was saved with other settings; construct it with these ({'; '.join(differing)})"
            )
        refuse_reordered(saved.get("parameters", ()), self._name_held())
        if self._correction is not None:
            self._correction.check_saved(saved["correction"])
        self._saved, self._saved_state = saved, state_dict["state"]

    def _load_state_dict(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Replace an optimizer's own `load_state_dict`, because that of bitsandbytes runs no hooks."""
        self._check_saved(self._optimizer, state_dict)
        type(self._optimizer).load_state_dict(self._optimizer, state_dict, *args, **kwargs)
        if self._optimizer.param_groups is not self._param_groups:  # else the hooks have run
            self._take_saved(self._optimizer)

    def _take_saved(self, optimizer: Optimizer) -> None:
        """Continue from the saved position. State of frozen blocks goes to host memory, or is released."""
        self.steps_done = self._saved["steps_done"]
        self.active_blocks = tuple(self._saved["active_blocks"])
        before = self._saved.get("previous_blocks")
        if before is None and self.period_index > 0:  # an older version saved no previous blocks
            before = draw_blocks(self.sampler, self.period_index - 1, seed=self.seed)
        self.previous_blocks = tuple(before or ())
        if self._collector is not None:
            self._collector.load_state_dict(self._saved["statistics"])
            if isinstance(self.sampler, Spectrum):
                self._rates.set_chances(self._find_chances())
        if self._correction is not None:
            self._correction.load_state_dict(self._saved["correction"])
        self.visits = list(self._saved["visits"])
        if self._proof is not None:
            self._proof.forget()
            self._proof.periods = self._saved["periods_proven"]
        self._moved.total, self._moved.periods = self._saved.get("moved", (0.0, 0))
        self._param_groups = optimizer.param_groups  # load_state_dict has replaced them
        if "lr_scaling" not in self._saved["settings"]:  # an older version: the rates are those of a step
            mark_as_scaled(optimizer.param_groups, "none")
        self._frozen_state.load(self._saved_state)
        self._saved_state = {}
        self._set_trainable()


def _tell_of_loading(model: nn.Module, keys: Any) -> None:
    """Tell the LISA of a model that `load_state_dict` was called, as a hook of the model."""
    lisa = _drives.get(model, lambda: None)()
    if lisa is not None:
        lisa._weights_were_loaded()


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _choose_period(
    period: int | Literal["auto"], sampler: Sampler, seed: int, total_steps: int | None
) -> int:
    if period == "auto":
        if total_steps is None:
            raise ValueError('period="auto" needs total_steps, the number of optimizer steps of the run')
        return choose_period(sampler, seed=seed, total_steps=total_steps)
    if not isinstance(period, Integral) or period < 1:
        raise ValueError(f'period must be a number of optimizer steps >= 1 or "auto", got {period!r}')
    return int(period)

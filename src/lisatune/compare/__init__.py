"""Methods side by side: `stages.compare` makes the runs, `lisatune.compare_results` says what comes out."""

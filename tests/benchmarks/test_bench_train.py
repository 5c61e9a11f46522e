from benchmarks import train


def test_what_is_compared_is_like_for_like_unless_its_name_says_how_not() -> None:
    variants = {variant.name: variant for variant in train.VARIANTS}
    for name, (ours, theirs) in train.RATIOS.items():
        assert variants[ours].dtype == variants[theirs].dtype
        assert (variants[ours].dropout == variants[theirs].dropout) == (not name.endswith("_no_dropout"))
    assert "train_vs_st_cached_mnrl" in train.RATIOS

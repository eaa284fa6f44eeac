"""Which settings of the data hold out other images."""

from igpt.data.split import split_differences


def test_what_holds_out_other_images() -> None:
    """By hand: a seed, a fraction, and a stream, which draws by content; what an older run does not name is off."""
    own = {"name": "a", "val_fraction": 0.1, "split_seed": 0, "streaming": False, "shift": 1}
    assert split_differences(own, own | {"name": "b", "shift": 2}) == []
    assert split_differences(own, {"name": "a", "val_fraction": 0.1}) == []
    assert split_differences(own, own | {"split_seed": 1, "val_fraction": 0.2}) == ["val_fraction", "split_seed"]
    assert split_differences(own, own | {"streaming": True}) == ["streaming"]

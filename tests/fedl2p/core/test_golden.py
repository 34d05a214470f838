"""The numbers of the authors' public code, and a further case of another shape."""

import json
from pathlib import Path

import numpy as np
import pytest
from golden_case import GoldenNet, compute

GOLDEN = Path(__file__).parents[2] / "golden"


def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as archive:
        return {key: archive[key] for key in archive.files}


def assert_equal(computed: dict[str, np.ndarray], golden: dict[str, np.ndarray]) -> None:
    expected = {key: value for key, value in golden.items() if key.startswith("out/")}
    assert set(computed) == set(expected)
    assert len(expected) > 50
    for key, value in expected.items():
        assert computed[key].shape == value.shape, key
        assert computed[key].dtype == value.dtype == np.float64, key
        error = np.abs(computed[key] - value).max()
        assert error <= 1e-9 * np.abs(value).max(), (key, error)


@pytest.mark.parametrize("name", ["golden_a.npz", "golden_b.npz"])
def test_every_number_of_the_authors_code(name: str) -> None:
    assert_equal(compute(GOLDEN / name), load(GOLDEN / name))


def test_the_answers_in_the_file_are_not_read(tmp_path: Path) -> None:
    golden = load(GOLDEN / "golden_b.npz")
    np.savez(tmp_path / "inputs.npz", **{k: v for k, v in golden.items() if not k.startswith("out/")})
    assert_equal(compute(tmp_path / "inputs.npz"), golden)


def test_a_case_of_another_shape_has_the_same_entries(tmp_path: Path) -> None:
    golden = load(GOLDEN / "golden_a.npz")
    spec = {"in_channels": 2, "width": 2, "num_classes": 6, "train_batches": [5, 3, 7], "inner_steps": 4}
    spec |= {"neumann_terms": 0, "neumann_lr": 0.3}
    rng = np.random.default_rng(0)
    case = {"spec": np.array(json.dumps(spec))}
    for name, tensor in GoldenNet(2, 2, 6).double().state_dict().items():
        if not name.endswith("num_batches_tracked"):
            low = 0.5 if name.endswith("running_var") else -0.5
            case[f"model/{name}"] = rng.uniform(low, low + 1, tensor.shape)
    case |= {key: value for key, value in golden.items() if key.startswith("meta/")}
    case |= {"data/train/x": rng.normal(size=(15, 2, 5, 7)), "data/train/y": rng.integers(6, size=15)}
    case |= {"data/val/x": rng.normal(size=(4, 2, 5, 7)), "data/val/y": rng.integers(6, size=4)}
    np.savez(tmp_path / "third.npz", **case)
    computed = compute(tmp_path / "third.npz")
    assert set(computed) == {key for key in golden if key.startswith("out/")}
    assert all(np.isfinite(value).all() for value in computed.values())
    assert computed["out/theta/conv2.weight"].shape == (4, 2, 3, 3)
    for key, value in computed.items():
        if key.startswith("out/hypergrad/"):
            assert value.shape == golden[key].shape
            assert np.abs(value).max() > 0
    # With Q = 0, p is the validation gradient itself, so psi plays no part.
    case["spec"] = np.array(json.dumps(spec | {"neumann_lr": 0.7}))
    np.savez(tmp_path / "other_psi.npz", **case)
    for key, value in compute(tmp_path / "other_psi.npz").items():
        np.testing.assert_array_equal(value, computed[key])

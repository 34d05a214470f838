"""What `from fedl2p import ...` gives, and what it costs."""

import subprocess
import sys

import pytest

import fedl2p


@pytest.mark.parametrize("name", fedl2p.__all__)
def test_every_promised_name_is_there(name: str) -> None:
    assert getattr(fedl2p, name).__name__ == name
    assert name in dir(fedl2p)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = fedl2p.Nothing


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ("torch", "lightning", "flwr", "ray", "wandb", "omegaconf", "numpy")
    code = f"import sys, fedl2p; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_client_needs_neither_flower_nor_the_rest_of_the_federation() -> None:
    code = (
        "import sys; from fedl2p import FedL2PClient; print([n for n in ('flwr', 'ray', 'wandb') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

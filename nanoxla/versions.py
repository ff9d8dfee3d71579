"""The versions of torch, torch_xla, jax and libtpu that the attention kernel was compiled with."""
import sys
from importlib.metadata import PackageNotFoundError, version

# With the jax and libtpu of each, the attention kernel was lowered and compiled for a TPU v5e.
TRIED = {
    "the image of Kaggle": {"python": "3.12", "torch": "2.8.0", "torch_xla": "2.8.0",
                            "jax": "0.7.2", "libtpu": "0.0.17"},
    "the image of Colab": {"python": "3.13", "torch": "2.9.0", "torch_xla": "2.9.0",
                           "jax": "0.7.2", "libtpu": "0.0.21.1"},
    "our default": {"python": "3.11", "torch": "2.9.0", "torch_xla": "2.9.0",
                    "jax": "0.7.1", "libtpu": "0.0.21"},
    "our default, Python 3.12": {"python": "3.12", "torch": "2.9.0", "torch_xla": "2.9.0",
                                 "jax": "0.7.1", "libtpu": "0.0.21"},
}


def installed():
    """{name: version} of Python and the packages in TRIED, None for a missing package. Without
    the ending of a build, such as the +cpu of torch 2.8.0+cpu. Imports none of them."""
    found = {"python": "{}.{}".format(*sys.version_info)}
    for name in ("torch", "torch_xla", "jax", "libtpu"):
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            found[name] = None
    return found


def tried_as(found):
    """The key of TRIED that has these versions, or None."""
    return next((name for name, versions in TRIED.items() if versions == found), None)


def install_line(found):
    """The pip command that brings jax and libtpu, beside the installed torch_xla, to versions that
    have been tried. It also replaces a torch_xla that has not been tried, and a torch that does
    not belong to the torch_xla."""
    usable = [versions for versions in TRIED.values()
              if versions["torch_xla"] == found["torch_xla"]] or [TRIED["our default"]]
    best = max(usable, key=lambda versions: versions["python"] == found["python"])
    packages = [f"jax=={best['jax']}", f"jaxlib=={best['jax']}", f"libtpu=={best['libtpu']}"]
    packages += [f"{name}=={best[name]}" for name in ("torch", "torch_xla")
                 if best[name] != found[name]]
    return f"pip install {' '.join(packages)}"

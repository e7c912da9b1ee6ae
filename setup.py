"""The packages, with the root configs/ installed as flashdit.configs; all else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["flashdit*", "iwin_core*", "iwin_tasks*"]), "flashdit.configs"],
    package_dir={"flashdit.configs": "configs"},
    package_data={
        "": ["py.typed"],
        "flashdit.configs": ["*.yaml", "iwin/*.yaml", "autoencoder/*.yaml"],
        "flashdit.digits": ["assets/**/*.safetensors", "assets/**/*.json"],
        "flashdit.glyphs": ["assets/**/*.safetensors", "assets/**/*.json"],
        "flashdit.evaluation.reports": ["*.j2"],
        "iwin_core.kernels": ["*.json"],
    },
)

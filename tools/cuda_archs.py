"""Reads TORCH_CUDA_ARCH_LIST, in every form in which torch and NVIDIA's containers write it."""

import re

from build_error import BuildError

OLDEST = (8, 0)  # a sum over a warp in one instruction (redux.sync) begins there
PREFERRED = ("8.0", "9.0", "10.0")

# torch's names of the generations (torch.utils.cpp_extension), as lists.
GENERATIONS = {
    "kepler+tesla": "3.7",
    "kepler": "3.5+PTX",
    "maxwell+tegra": "5.3",
    "maxwell": "5.0 5.2+PTX",
    "pascal": "6.0 6.1+PTX",
    "volta+tegra": "7.2",
    "volta": "7.0+PTX",
    "turing": "7.5+PTX",
    "ampere+tegra": "8.7",
    "ampere": "8.0 8.6+PTX",
    "ada": "8.9+PTX",
    "hopper": "9.0+PTX",
    "blackwell+tegra": "11.0",
    "blackwell": "10.0 10.3 12.0 12.1+PTX",
    "rubin": "10.7+PTX",
}
# What torch and CMake read off the visible GPUs: a build must not depend on those.
UNDECIDED = ("", "native", "auto", "common")


def choose_archs(asked, known):
    """The architectures to compile for, and a line that says what was left out of the list.

    Args:
        asked: TORCH_CUDA_ARCH_LIST.
        known: what ``nvcc --list-gpu-arch`` prints: compute_80, compute_90, ...; "" if it did not
            answer, and then nothing is taken to be unknown.

    Returns:
        A list in the form "8.0;9.0a;10.0+PTX", and the line, or "".
    """
    words = [word for word in re.split(r"[\s;,]+", asked.strip(" \t\n;,\"'")) if word]
    numbers = [_number(code) for code in re.findall(r"compute_(\d+)\b", known)]
    numbers = sorted({number for number in numbers if number >= OLDEST})
    if len(words) <= 1 and "".join(words).lower() in UNDECIDED:
        wanted = [_number(arch.replace(".", "")) for arch in PREFERRED]
        found = [number for number in wanted if number in numbers] or wanted[:1]
        return ";".join(map(_text, found)) + "+PTX", ""

    listed = []
    for word in words:
        if word.lower() in ("all", "all-major") and numbers:
            major = word.lower() == "all-major"
            listed += [_text(number) for number in numbers if not (major and number[1])]
            listed[-1] += "+PTX"
        elif word.lower() in ("all", "all-major"):
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST={asked!r}: nvcc does not say which architectures it knows "
                "(nvcc --list-gpu-arch). Name them, as in TORCH_CUDA_ARCH_LIST='8.0;9.0+PTX'"
            )
        else:
            listed += GENERATIONS.get(word.lower(), word).split()
    kept, dropped, ptx_dropped = {}, [], False
    for word in listed:
        number, suffix, ptx = _read(word, asked)
        if number < OLDEST:
            dropped.append(_text(number))
            ptx_dropped |= ptx
        elif numbers and number not in numbers:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST={asked!r}: the nvcc that was found does not know "
                f"{_text(number)}. It knows {', '.join(map(_text, numbers))}: leave the other out, "
                "or set CUDA_HOME to a newer toolkit"
            )
        else:
            code = _text(number) + suffix
            kept[code] = kept.get(code, False) or ptx
    if not kept:
        raise BuildError(
            f"TORCH_CUDA_ARCH_LIST={asked!r}: the kernels need compute capability "
            f"{_text(OLDEST)} or later, and nothing in the list is. Write "
            f"TORCH_CUDA_ARCH_LIST='{_text(OLDEST)}+PTX', or FORCE_CPU=1 to leave CUDA out"
        )
    if ptx_dropped:  # newer GPUs would have run by that PTX: the oldest that is kept does the same
        plain = [code for code in kept if code[-1].isdigit()]
        if plain:
            kept[min(plain, key=lambda code: _read(code, asked)[0])] = True
    text = ";".join(code + "+PTX" * ptx for code, ptx in kept.items())
    dropped = ", ".join(dict.fromkeys(dropped))
    line = (
        f"gmc_cuda: TORCH_CUDA_ARCH_LIST: left out {dropped}, because the kernels need "
        f"{_text(OLDEST)} or later; built for {text}"
    )
    return text, line if dropped else ""


def gencode_flags(archs):
    """nvcc's flags for a list that choose_archs gave."""
    flags = []
    for arch in archs.split(";"):
        number, suffix, ptx = _read(arch, archs)
        code = f"{number[0]}{number[1]}{suffix}"
        flags.append(f"-gencode=arch=compute_{code},code=sm_{code}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{code},code=compute_{code}")
    return flags


def _read(word, asked):
    """((9, 0), "a", True) of "9.0a+PTX"."""
    parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+ptx)?", word, re.IGNORECASE)
    if not parts:
        digits = re.search(r"(?<!\d)(\d{2,3})([af]?)(?!\d)", word)  # 80, sm_90a, compute_100
        meant = f"; is {_text(_number(digits[1]))}{digits[2]} meant?" if digits else ""
        raise BuildError(
            f"TORCH_CUDA_ARCH_LIST={asked!r}: {word!r} is neither of the form 9.0, 9.0a or "
            f"9.0+PTX nor a generation such as Hopper{meant}"
        )
    number, suffix = (int(parts[1]), int(parts[2])), parts[3].lower()
    if suffix and (9, 0) > number >= OLDEST:
        raise BuildError(
            f"TORCH_CUDA_ARCH_LIST={asked!r}: {word!r} does not exist, because variants with a "
            f"letter begin at 9.0a. Write {_text(number)}"
        )
    return number, suffix, bool(parts[4])


def _number(code):
    return int(code[:-1]), int(code[-1])


def _text(number):
    return f"{number[0]}.{number[1]}"

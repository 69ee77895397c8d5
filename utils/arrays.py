"""Named arrays of an .npz file that any program may have written."""

import zipfile

import numpy as np

from utils.cli import UserError


def load_arrays(path, names, layout):
    """Read numeric arrays from an .npz file, without pickles.

    layout: what the file must hold, for error messages. Returns {name: array}.
    Raises UserError: no such file, no .npz file, a missing array, not numbers, damaged.
    """
    hint = f"--embeddings takes an .npz file with {layout}"
    if not path.exists():
        raise UserError(f"{path}: no such file; {hint}")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: not an .npz file (numpy.savez writes one); {hint}")
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in names if name not in file.files]
            if missing:
                found = ", ".join(file.files) or "none"
                raise UserError(f"{path}: has no array {missing[0]}, only {found}; {hint}")
            arrays = {name: file[name] for name in names}
    except MemoryError:
        raise UserError(f"{path}: declares arrays larger than the memory; {hint}") from None
    except UserError:
        raise
    # a damaged .npz file fails in zipfile, zlib or numpy in many ways
    except Exception as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}; {hint}") from None
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub":
            raise UserError(f"{path}: {name} is {array.dtype}, not numbers; {hint}")
    return arrays

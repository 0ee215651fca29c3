"""Where data is and how it is read: paths, names and hub datasets to records, one at a time.

A record is whatever stands in a line or row, with a name for the place (`file.jsonl:17`); what it
means is the business of `formats`. What is wrong with a whole file raises `DataError`; what is
wrong with one line comes out as a `BrokenRecord` in its place.
"""

import contextlib
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

SUFFIXES = (".jsonl.gz", ".jsonl", ".parquet", ".json", ".json.gz")


class DataError(ValueError):
    """A problem with the user's data, in one sentence: what is wrong, where, what to do."""


class BrokenRecord(NamedTuple):
    """Stands in the place of a line that cannot be read."""

    kind: str
    detail: str


_HUB_NAME = re.compile(
    r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<config>[^:/]+))?(?::(?P<split>[^/]+))?"
)
_SPLIT_PREFIX = re.compile(r"(train|test|validation|valid|val|dev|eval)(?![a-zA-Z])")


class HubName(NamedTuple):
    """A dataset of the Hugging Face hub; `config=None` is its default one."""

    repo: str
    config: str | None
    split: str

    def __str__(self) -> str:
        return f"{self.repo}{f'@{self.config}' if self.config else ''}:{self.split}"


def resolve_source(
    source: str | Path,
    *,
    data_dir: str | Path | None = None,
    local_names: Mapping[str, str] | None = None,
) -> Path | HubName:
    """Finds what a source names: a path that exists, data under `data_dir`, or a hub dataset.

    1. A file, a folder, or `folder:split` that exists.
    2. A name, `[owner/]name[@config][:split]`, under `data_dir` (else the environment's
       TRUEWARD_DATA): first what `local_names` calls it, then `owner/name`, then `name`. Each may
       be a data file or a folder (with a config, that folder's folder of this name). In a folder
       the split's file is taken (`train` if no split is given); else the folder's only file,
       unless its name says that it is another split.
    3. `owner/name...` is a hub dataset, split `train` if none is given.
    """
    if Path(source).expanduser().exists():
        return Path(source).expanduser()
    name = str(source)
    folder, _, split = name.rpartition(":")
    if folder and Path(folder).expanduser().is_dir():
        found = _split_file(Path(folder).expanduser(), split)
        if found is None:
            raise DataError(f"{folder} holds no split '{split}': {_listing(Path(folder))}.")
        return found
    if isinstance(source, Path) or name.startswith((".", "/", "~")) or not name:
        raise DataError(f"'{name}' does not exist; give a data file, a folder or a dataset's name.")
    root = _data_dir(data_dir)
    tried = _local_candidates(name, local_names or {})
    if root is not None:
        found = next((path for n in tried if (path := _find_local(root, n))), None)
        if found is not None:
            return found
    match = _HUB_NAME.fullmatch(name)
    if match and "/" in match["repo"] and not name.endswith(SUFFIXES):
        return HubName(match["repo"], match["config"], match["split"] or "train")
    raise DataError(
        f"'{name}' is neither a path that exists nor a hub name, and {_search(root, tried)}; "
        "give a path, or owner/name[@config][:split]."
    )


def _search(root: Path | None, tried: list[str]) -> str:
    """What the look under the data folder came to, for the error."""
    if root is None:
        return "no data_dir or TRUEWARD_DATA says where else to look"
    for name in tried:
        folder = root / name.partition(":")[0].replace("@", "/")
        if folder.is_dir():
            return f"{folder} has no such split: {_listing(folder)}"
    return f"{root} has no {' or '.join(tried)}"


def _data_dir(data_dir: str | Path | None) -> Path | None:
    chosen = data_dir if data_dir is not None else os.environ.get("TRUEWARD_DATA") or None
    if chosen is None:
        return None
    root = Path(chosen).expanduser()
    if not root.is_dir():
        label = "TRUEWARD_DATA" if data_dir is None else "data_dir"
        raise DataError(f"{label} names '{root}', which is not a folder.")
    return root


def _local_candidates(name: str, local_names: Mapping[str, str]) -> list[str]:
    """The names to look for under the data folder, most particular first, each once."""
    mapped = local_names.get(name)
    if mapped is None and ":" not in name:
        mapped = local_names.get(f"{name}:train")
    names = [name, name.partition("/")[2]]
    return list(dict.fromkeys(n for n in [mapped, *names] if n))


def _find_local(root: Path, name: str) -> Path | None:
    match = _HUB_NAME.fullmatch(name)
    if match is None:
        return root / name if _is_data_file(root / name) else None
    base = root / match["repo"]
    if match["config"]:
        base = base / match["config"]
    split = match["split"]
    if _is_data_file(base) and split in (None, "train"):
        return base
    if base.is_dir():
        return _split_file(base, split or "train")
    # A single file says nothing of splits: it must not pass for a test set.
    return _with_suffix(base.parent, base.name) if split in (None, "train") else None


def _split_file(folder: Path, split: str) -> Path | None:
    found = _with_suffix(folder, split)
    files = _data_files(folder)
    if found is None and len(files) == 1:
        # The only file stands in for the split, unless it is named after another one.
        prefix = _SPLIT_PREFIX.match(files[0].name)
        found = files[0] if prefix is None or prefix[1] == split else None
    return found


def _with_suffix(folder: Path, stem: str) -> Path | None:
    paths = (folder / f"{stem}{suffix}" for suffix in SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def _is_data_file(path: Path) -> bool:
    return path.is_file() and path.name.endswith(SUFFIXES)


def _data_files(folder: Path) -> list[Path]:
    files = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(path for path in files if _is_data_file(path))


def _listing(folder: Path) -> str:
    names = [path.name for path in _data_files(folder.expanduser())]
    return f"it has {', '.join(names)}" if names else f"it has no {', '.join(SUFFIXES)} file"


Records = Iterator[tuple[str, object]]


def record_streams(resolved: Path | HubName) -> Iterator[tuple[str, Records]]:
    """The source's files in order, each with its records and where they stand."""
    if isinstance(resolved, HubName):
        yield str(resolved), _hub_records(resolved)
        return
    if not resolved.is_dir():
        yield str(resolved), _file_records(resolved)
        return
    files = _data_files(resolved)
    if not files:
        raise DataError(f"{resolved} is a folder without data: {_listing(resolved)}.")
    splits = {m[1] for path in files if (m := _SPLIT_PREFIX.match(path.name))}
    if len(splits) > 1:
        raise DataError(
            f"{resolved} holds several splits ({', '.join(sorted(splits))}), which must not be "
            f"mixed; name one, as in {resolved}:{sorted(splits)[-1]}."
        )
    for path in files:
        yield str(path), _file_records(path)


def _file_records(path: Path) -> Records:
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        for number, line in _lines(path):
            if line.strip():
                yield f"{path.name}:{number}", _parsed(line.rstrip("\r\n"))
    elif path.name.endswith((".json", ".json.gz")):
        yield from _json_records(path)
    elif path.name.endswith(".parquet"):
        yield from _parquet_records(path)
    else:
        raise DataError(f"{path} is not a data file; wanted one of {', '.join(SUFFIXES)}.")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines, numbered from 1 as an editor numbers them."""
    number = 0
    try:
        with _open_binary(path) as file:
            for number, line in enumerate(file, 1):
                # Some editors put a byte-order mark before the first line.
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        detail = f"byte {error.start} of the line is 0x{byte:02x}"
        raise DataError(
            f"{path}:{number} is not UTF-8 text ({detail}); save it as UTF-8."
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is a broken gzip file, after line {number} ({error}); fetch it again."
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _open_binary(path: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.GzipFile(path) if path.name.endswith(".gz") else path.open("rb")


def _parsed(text: str) -> object:
    """The value that a text holds, or what is wrong with it."""
    try:
        value = json.loads(text)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            # A lone half of a surrogate pair is legal JSON but no text: tokenizers crash on it.
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return BrokenRecord("broken JSON", f"{error.msg} at {line}column {error.colno}")
    except UnicodeEncodeError:
        return BrokenRecord("broken JSON", "a \\u escape is half of a surrogate pair")
    except (ValueError, RecursionError) as error:  # an endless number, endless nesting
        return BrokenRecord("broken JSON", str(error))
    return value


def _json_records(path: Path) -> Records:
    text = "".join(line for _, line in _lines(path))
    value = _parsed(text if text.strip() else "[]")
    if isinstance(value, BrokenRecord):
        hint = "if it holds one object a line, name it .jsonl"
        raise DataError(f"{path} is broken JSON ({value.detail}); {hint}.")
    if not isinstance(value, list):
        raise DataError(f"{path} must hold a list of objects, got {json_type(value)}.")
    for number, record in enumerate(value, 1):
        yield f"{path.name} row {number}", record


def _parquet_records(path: Path) -> Records:
    # Imported here: reading JSON should not wait for arrow, nor any file for datasets.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path.name} row {number}", _without_nulls(record)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}.") from error


def _hub_records(name: HubName) -> Records:
    import datasets

    try:
        dataset = datasets.load_dataset(name.repo, name.config, split=name.split)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{name} cannot be loaded from the Hugging Face hub: {error}") from error
    for number, record in enumerate(dataset, 1):
        yield f"{name} row {number}", _without_nulls(record)


def json_type(value: object) -> str:
    """What JSON calls the type of a value, with its article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    if value is None:
        return "null"
    return names.get(type(value), "a number" if isinstance(value, int | float) else "a value")


def _without_nulls(record: dict[str, Any]) -> dict[str, Any]:
    """A columnar row without the keys that only its neighbours' messages have.

    Arrow gives every message of a column the same keys, null where absent; templates would print
    them, and the same row would differ from its JSON.
    """
    return {column: _drop_null_keys(value) for column, value in record.items()}


def _drop_null_keys(value: Any) -> Any:
    if isinstance(value, list):
        return [_drop_null_keys(item) for item in value]
    if isinstance(value, dict):
        return {key: _drop_null_keys(item) for key, item in value.items() if item is not None}
    return value


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a `.jsonl` or `.jsonl.gz` file with their line numbers; strict, no report."""
    for number, line in _lines(Path(path)):
        if not line.strip():
            continue
        value = _parsed(line.rstrip("\r\n"))
        if isinstance(value, BrokenRecord):
            raise DataError(f"{path}:{number} is broken JSON: {value.detail}.")
        if not isinstance(value, dict):
            raise DataError(f"{path}:{number} must hold an object, got {json_type(value)}.")
        yield number, value


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes rows as JSON lines (gzipped for `.gz`), all of them or nothing; returns how many.

    The file appears under its name only once it is complete, and the same rows give the same bytes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    number = 0
    try:
        with partial.open("wb") as raw, _compressed(raw, path) as file:
            for number, row in enumerate(rows, 1):
                file.write(_json_line(row, f"row {number} for {path}"))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return number


def _compressed(
    raw: io.BufferedWriter, path: Path
) -> contextlib.AbstractContextManager[gzip.GzipFile | io.BufferedWriter]:
    if path.suffix != ".gz":
        return contextlib.nullcontext(raw)
    # Neither the file's name nor the time go into the bytes.
    return gzip.GzipFile("", "wb", fileobj=raw, mtime=0)


def _json_line(row: Mapping[str, Any], name: str) -> bytes:
    try:
        return (json.dumps(dict(row), ensure_ascii=False, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} cannot be written as JSON: {error}.") from error

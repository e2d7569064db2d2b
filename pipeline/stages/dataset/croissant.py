"""`croissant.json`: the data set in Croissant 1.1 with RAI and PROV-O, for tools that read no other description.

Written by hand: mlcroissant, which the tests validate with, misspells a term of RAI and drops types on a round trip. No
clock is in it, so that equal rows give equal bytes; `datePublished` belongs to whoever publishes.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote

import pyarrow as pa

from pipeline.core.lineage import file_sha256
from pipeline.core.stage import Json
from pipeline.stages.dataset.facts import Facts
from pipeline.terms.licenses import parse_license
from pipeline.terms.notices import DISCLAIMER, LICENSES_MD
from pipeline.terms.statement import Source

FILE: Final = "croissant.json"
PARQUET: Final = "application/x-parquet"

_OWN_TERMS: Final = (
    *("arrayShape", "citeAs", "column", "containedIn", "equivalentProperty", "extract", "field", "fileProperty"),
    *("fileObject", "fileSet", "format", "includes", "isArray", "isLiveDataset", "jsonPath", "key", "md5"),
    *("parentField", "path", "recordSet", "references", "regex", "repeated", "replace", "samplingRate", "separator"),
    *("source", "subField", "transform"),
)
CONTEXT: Final[dict[str, Json]] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "prov": "http://www.w3.org/ns/prov#",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "name": {"@container": "@language"},
    "description": {"@container": "@language"},
    **{term: f"cr:{term}" for term in _OWN_TERMS},
}
"""The context of the specification, and PROV-O."""

DESCRIPTIONS: Final[Mapping[str, str]] = {
    "prompt": "Messages that were asked; calls of tools are in the shards only.",
    "completion": "Messages that the teacher answered; calls of tools are in the shards only.",
    "tools": "Functions that the prompt offers, as JSON.",
    "row_id": "Id of the row, over its prompt and what was asked of the teacher.",
    "prompt_set": "Name of the prompt set.",
    "prompt_id": "Id of the prompt in its set.",
    "also_in": "Other prompt sets that held the same row.",
    "teacher": "Name of the source that wrote the completion.",
    "returned_model": "Model that the provider says answered.",
    "fingerprint": "Fingerprint that the provider gave with the answer.",
    "license_set": "Licences and terms of the prompt, of its duplicates and of the teacher.",
    "finish_reason": "Why the teacher stopped.",
    "prompt_tokens": "Tokens of the prompt by the teacher's count.",
    "completion_tokens": "Tokens of the completion by the teacher's count.",
    "task": "Kind of task.",
    "answer": "Reference answer.",
    "verified": "Whether the completion agrees with the reference answer.",
}


@dataclass(frozen=True, slots=True)
class Split:
    """A split's shards.

    Attributes:
        name: "train" or "validation".
        files: its shards, in order.
        rows: in all of them.
    """

    name: str
    files: tuple[Path, ...]
    rows: int


def write_croissant(out: Path, facts: Facts, splits: Sequence[Split], schema: pa.Schema) -> None:
    """Write the description of the shards under `out`, which are read for their hashes."""
    text = json.dumps(describe(out, facts, splits, schema), indent=1, ensure_ascii=True) + "\n"
    (out / FILE).write_text(text, "utf-8", newline="\n")


def describe(out: Path, facts: Facts, splits: Sequence[Split], schema: pa.Schema) -> dict[str, Json]:
    """The description as JSON-LD."""
    files: list[Json] = [_file(out, path) for split in splits for path in split.files]
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": ["http://mlcommons.org/croissant/1.1", "http://mlcommons.org/croissant/RAI/1.0"],
        "name": facts.title,
        "description": facts.description,
        "identifier": f"sha256:{facts.content}",
        "license": [_license(name) for name in sorted(facts.census.licenses)],
        "usageInfo": {
            "@type": "sc:CreativeWork",
            "name": "Licences, terms and what they ask for",
            "url": LICENSES_MD,
            "description": DISCLAIMER,
        },
        **_responsible(facts),
        **_provenance(facts),
        "distribution": [*files, *map(_file_set, splits)],
        "recordSet": [_record_set(split, schema) for split in splits],
    }


def _license(name: str) -> Json:
    parsed = parse_license(name)
    simple = parsed.spdx and " " not in parsed.name and not parsed.name.startswith("LicenseRef-")
    if simple:
        return f"https://spdx.org/licenses/{quote(parsed.name)}"
    return {"@type": "sc:CreativeWork", "name": name, "url": LICENSES_MD}


# --------------------------------------------------------------------------------------------------------------- files


def _file(out: Path, path: Path) -> Json:
    name = path.relative_to(out).as_posix()
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": path.name,
        "contentUrl": name,
        "contentSize": f"{path.stat().st_size} B",
        "encodingFormat": PARQUET,
        "sha256": file_sha256(path),
    }


def _file_set(split: Split) -> Json:
    return {
        "@type": "cr:FileSet",
        "@id": _shards(split.name),
        "name": f"shards of {split.name}",
        "encodingFormat": PARQUET,
        "includes": f"data/{split.name}-*.parquet",
    }


def _shards(split: str) -> str:
    return f"{split}-shards"


# ------------------------------------------------------------------------------------------------------------- columns


def _record_set(split: Split, schema: pa.Schema) -> Json:
    return {
        "@type": "cr:RecordSet",
        "@id": split.name,
        "name": split.name,
        "description": f"{split.rows} rows.",
        "key": {"@id": f"{split.name}/row_id"},
        "field": [_column(split.name, column) for column in schema],
    }


def _column(split: str, column: pa.Field) -> Json:
    place = _Place(split, column.name, f"{split}/{column.name}", "")
    return {**_field(place, column), "description": DESCRIPTIONS[column.name]}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a value lies: its column and the JSON path inside it ("" is the column itself)."""

    split: str
    column: str
    id: str
    path: str


def _field(place: _Place, field: pa.Field) -> dict[str, Json]:
    """A column or a part of one; lists are arrays of one unbounded dimension, structs have sub-fields.

    Lists inside of lists (a turn's tool calls) are left out: mlcroissant reads no record that holds one.
    """
    kind, array = field.type, pa.types.is_list(field.type)
    inner, path = (kind.value_type, f"{place.path}[*]") if array else (kind, place.path)
    described: dict[str, Json] = {
        "@type": "cr:Field",
        "@id": place.id,
        "name": field.name,
        **({"isArray": True, "arrayShape": "-1"} if array else {}),
        "source": {
            "fileSet": {"@id": _shards(place.split)},
            "extract": {"column": place.column},
            **({"transform": {"jsonPath": f"${place.path}"}} if place.path else {}),
        },
    }
    if not pa.types.is_struct(inner):
        return {**described, "dataType": _data_type(inner)}
    parts = [inner.field(at) for at in range(inner.num_fields)]
    parts = [part for part in parts if not (array and pa.types.is_list(part.type))]
    return {**described, "subField": [_field(_below(place, path, part), part) for part in parts]}


def _below(place: _Place, path: str, part: pa.Field) -> _Place:
    return _Place(place.split, place.column, f"{place.id}/{part.name}", f"{path}.{part.name}")


def _data_type(kind: pa.DataType) -> str:
    if pa.types.is_boolean(kind):
        return "sc:Boolean"
    return "cr:Int32" if pa.types.is_int32(kind) else "sc:Text"


# ----------------------------------------------------------------------------------------------------------- RAI, PROV


def _responsible(facts: Facts) -> dict[str, Json]:
    """The properties of Croissant's RAI vocabulary that this pipeline knows the value of."""
    prompts = ", ".join(f"{each.name} ({each.what})" for each in facts.sources("prompt"))
    teachers = ", ".join(f"{each.name} ({each.what})" for each in facts.sources("teacher"))
    tools: list[Json] = [f"{each.name}: {each.what}" for each in facts.models]
    return {
        "rai:hasSyntheticData": bool(facts.models),
        "rai:dataCollection": f"Prompts: {prompts}. Each was answered by: {teachers}.",
        "rai:dataPreprocessingProtocol": [*facts.funnel],
        **({"rai:machineAnnotationTools": tools} if tools else {}),
        "rai:dataUseCases": "Training language models on the completions (sequence-level distillation).",
        "rai:dataLimitations": [*facts.limits],
        "rai:personalSensitiveInformation": "Prompts and completions are free text and may hold some.",
    }


def _provenance(facts: Facts) -> dict[str, Json]:
    """PROV-O: what the rows were derived from, by which activity, on whose behalf."""
    used = [*facts.sources("prompt"), *facts.sources("teacher")]
    return {
        "prov:wasDerivedFrom": [_entity(source) for source in used if source not in facts.models],
        "prov:wasGeneratedBy": {
            "@type": "prov:Activity",
            "@id": "#generation",
            "prov:label": "prompts answered, filtered, deduplicated",
            "prov:used": [{"@id": _id(source)} for source in used if source not in facts.models],
            "prov:wasAssociatedWith": [*_agents(facts)],
        },
    }


def _entity(source: Source) -> Json:
    return {
        "@type": "prov:Entity",
        "@id": _id(source),
        "prov:label": source.what,
        "dct:license": [*source.licenses],
    }


def _agents(facts: Facts) -> Iterator[Json]:
    for source in facts.models:
        yield {
            "@type": "prov:SoftwareAgent",
            "@id": _id(source),
            "prov:label": source.what,
            "dct:license": [*source.licenses],
        }


def _id(source: Source) -> str:
    return f"#{source.role}/{quote(source.name, safe='')}"

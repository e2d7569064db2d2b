"""What the data set and the student are meant for: the policy that terms are judged by."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, StringConstraints

from pipeline.core.config_base import OPERATIONAL, ConfigModel

IntendedUse = Literal["commercial", "research"]
ReleaseScope = Literal["none", "internal", "public"]
Competes = Annotated[Literal["yes", "no", "undetermined"], BeforeValidator(lambda value: _yes_no(value))]
Country = Annotated[
    str, BeforeValidator(lambda value: "NO" if value is False else value), StringConstraints(pattern=r"^[A-Z]{2}$")
]
Role = Literal["teacher", "prompt", "system_prompt", "student_base", "judge", "reward_model", "embedder", "translator"]
Confidence = Literal["verified", "mirrored", "inferred", "unverified", "user_asserted"]


def _yes_no(value: object) -> object:
    """YAML 1.1 reads an unquoted `no` as false (and Norway with it)."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


class Release(ConfigModel):
    """Who gets what comes out; it has no default."""

    dataset: ReleaseScope
    """Who gets the data set: nobody else, people of the same organisation, everybody."""
    model: ReleaseScope
    """Who gets the student."""


class Organisation(ConfigModel):
    """Facts about who distils, for terms with a limit of size."""

    mau: Annotated[int, Field(ge=0)] = 0
    """Monthly active users of all its products."""
    annual_revenue_usd: Annotated[int, Field(ge=0)] = 0
    """Revenue of a year in US dollars."""


class Competition(ConfigModel):
    """Whether the student competes with a provider, and why one thinks so."""

    value: Competes
    """`no` lets terms pass that forbid competing models only."""
    reason: str = ""
    """For whoever reads the data set's manifest."""


class PolicyConfig(ConfigModel):
    """What is meant to be done with the data set and the student; terms that forbid it stop the run (exit 4)."""

    intended_use: IntendedUse
    """`research` is non-commercial and makes no product. It has no default."""
    release: Release
    """Who gets the data set and the model. It has no default."""
    allow_unknown: bool = False
    """True lets rows through whose terms nobody knows, with a warning that stays in every card. It never lets through
    what known terms forbid."""
    territory: tuple[Country, ...] = ()
    """Countries (ISO 3166-1, two letters, or EU) in which the results are made or used; some terms exclude some."""
    org: Organisation = Organisation()
    """For terms with a limit of size."""
    competes_with: dict[str, Competes | Competition] = Field(default_factory=dict)
    """Provider -> whether the student competes with its products. A provider that is not named is undetermined, and
    its terms against competing models refuse the run."""
    choose: dict[str, str] = Field(default_factory=dict)
    """`MIT OR Apache-2.0` -> the one that is taken. Without a choice the one with the fewest obligations is."""
    roles_that_train: tuple[Role, ...] = ("teacher", "prompt", "student_base", "judge", "reward_model")
    """Whose terms bind the student."""
    min_confidence: Confidence = "mirrored"
    """Term records below it count as unknown; from the highest: verified, mirrored, user_asserted, inferred,
    unverified."""
    max_record_age_days: Annotated[int, Field(ge=1)] = 180
    """API terms that were read longer ago are warned of."""
    registry: Annotated[Path | None, OPERATIONAL] = None
    """Folder with term records of your own, beside those that come along."""
    texts: Annotated[Path | None, OPERATIONAL] = None
    """Folder with full texts, `<id>.txt`, for licences whose text no installed package has."""
    overrides: Annotated[Path | None, OPERATIONAL] = None
    """File that `licenses override` appends to: permissions and interpretations that people signed for."""

    def competes(self, provider: str) -> Competes:
        """Whether the student competes with a provider."""
        said = self.competes_with.get(provider, "undetermined")
        return said.value if isinstance(said, Competition) else said


def files_of_policy(policy: PolicyConfig) -> dict[str, Path]:
    """Files whose bytes decide a verdict, where they are there; of a folder each by its name."""
    named = {
        "policy.registry": policy.registry,
        "policy.texts": policy.texts,
        "policy.overrides": policy.overrides,
    }
    found: dict[str, Path] = {}
    for name, path in named.items():
        if path is not None and path.is_dir():
            inside = (file for file in sorted(path.rglob("*")) if file.is_file())
            found |= {f"{name}.{file.relative_to(path).as_posix()}": file for file in inside}
        elif path is not None and path.exists():
            found[name] = path
    return found

"""What the data set and the student are meant for: the policy that terms are judged by."""

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints

from pipeline.core.config_base import OPERATIONAL, ConfigModel
from pipeline.core.errors import UsageError

IntendedUse = Literal["commercial", "research"]
ReleaseScope = Literal["none", "internal", "public"]
Competes = Annotated[Literal["yes", "no", "undetermined"], BeforeValidator(lambda value: _yes_no(value))]
Country = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Z]{2}$"),
    AfterValidator(lambda code: _known_country(code)),
    BeforeValidator(lambda value: _country_code(value)),
]
Role = Literal["teacher", "prompt", "system_prompt", "student_base", "judge", "reward_model", "embedder", "translator"]
Confidence = Literal["verified", "mirrored", "inferred", "unverified", "user_asserted"]

# fmt: off
COUNTRIES: Final = frozenset(
    {
        "AD", "AE", "AF", "AG", "AI", "AL", "AM", "AO", "AQ", "AR", "AS", "AT", "AU", "AW", "AX", "AZ", "BA", "BB",
        "BD", "BE", "BF", "BG", "BH", "BI", "BJ", "BL", "BM", "BN", "BO", "BQ", "BR", "BS", "BT", "BV", "BW", "BY",
        "BZ", "CA", "CC", "CD", "CF", "CG", "CH", "CI", "CK", "CL", "CM", "CN", "CO", "CR", "CU", "CV", "CW", "CX",
        "CY", "CZ", "DE", "DJ", "DK", "DM", "DO", "DZ", "EC", "EE", "EG", "EH", "ER", "ES", "ET", "FI", "FJ", "FK",
        "FM", "FO", "FR", "GA", "GB", "GD", "GE", "GF", "GG", "GH", "GI", "GL", "GM", "GN", "GP", "GQ", "GR", "GS",
        "GT", "GU", "GW", "GY", "HK", "HM", "HN", "HR", "HT", "HU", "ID", "IE", "IL", "IM", "IN", "IO", "IQ", "IR",
        "IS", "IT", "JE", "JM", "JO", "JP", "KE", "KG", "KH", "KI", "KM", "KN", "KP", "KR", "KW", "KY", "KZ", "LA",
        "LB", "LC", "LI", "LK", "LR", "LS", "LT", "LU", "LV", "LY", "MA", "MC", "MD", "ME", "MF", "MG", "MH", "MK",
        "ML", "MM", "MN", "MO", "MP", "MQ", "MR", "MS", "MT", "MU", "MV", "MW", "MX", "MY", "MZ", "NA", "NC", "NE",
        "NF", "NG", "NI", "NL", "NO", "NP", "NR", "NU", "NZ", "OM", "PA", "PE", "PF", "PG", "PH", "PK", "PL", "PM",
        "PN", "PR", "PS", "PT", "PW", "PY", "QA", "RE", "RO", "RS", "RU", "RW", "SA", "SB", "SC", "SD", "SE", "SG",
        "SH", "SI", "SJ", "SK", "SL", "SM", "SN", "SO", "SR", "SS", "ST", "SV", "SX", "SY", "SZ", "TC", "TD", "TF",
        "TG", "TH", "TJ", "TK", "TL", "TM", "TN", "TO", "TR", "TT", "TV", "TW", "TZ", "UA", "UG", "UM", "US", "UY",
        "UZ", "VA", "VC", "VE", "VG", "VI", "VN", "VU", "WF", "WS", "YE", "YT", "ZA", "ZM", "ZW",
        "EU",
    }
)
# fmt: on
"""Country codes (ISO 3166-1 alpha-2, all 249 that are assigned) and the EU, which that standard reserves."""


def _country_code(value: object) -> object:
    """YAML 1.1 reads an unquoted NO as false; UK is what many write for GB."""
    if value is False:
        return "NO"
    return "GB" if value == "UK" else value


def _known_country(code: str) -> str:
    if code not in COUNTRIES:
        raise ValueError(f"{code} is neither a country's code (ISO 3166-1, two letters) nor EU")
    return code


def _yes_no(value: object) -> object:
    """YAML 1.1 reads an unquoted `no` as false."""
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
    """Countries (ISO 3166-1, two letters, or EU) in which the results are made or used; some terms exclude some,
    and stop a public release while none is named."""
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
    """Files whose bytes decide a verdict, where they are there; of a folder each by its name.

    Raises:
        UsageError: a name in a folder is not UTF-8; it names the folder.
    """
    named = {
        "policy.registry": policy.registry,
        "policy.texts": policy.texts,
        "policy.overrides": policy.overrides,
    }
    found: dict[str, Path] = {}
    for name, path in named.items():
        if path is not None and path.is_dir():
            inside = [file for file in sorted(path.rglob("*")) if file.is_file()]
            if not all(_is_text(str(file.relative_to(path))) for file in inside):
                what = "the name of a file in it is not UTF-8, and the names count in keys"
                raise UsageError(what, where=f"{name}: {path}", todo="rename that file or move it elsewhere")
            found |= {f"{name}.{file.relative_to(path).as_posix()}": file for file in inside}
        elif path is not None and path.exists():
            found[name] = path
    return found


def _is_text(name: str) -> bool:
    """Whether a file's name is UTF-8: Python reads other bytes as lone surrogates."""
    return not any("\ud800" <= sign <= "\udfff" for sign in name)

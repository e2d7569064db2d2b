"""Stage `report`: what the page says of a run, and that no text in it can act."""

import copy
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipeline.core.config import ReportConfig, ReportStep
from pipeline.core.errors import CorruptArtefact, Interrupted
from pipeline.core.lineage import Manifest
from pipeline.core.record import Message
from pipeline.stages import report
from tests.report_artefacts import (
    EVALUATION,
    SOURCES,
    TEACHER,
    Run,
    a_row,
    change_manifest,
    ordinary_run,
    write_report,
    write_run,
)
from tests.support import a_prompt, make_context

ATTACKS = (
    "<script>document.title='owned'</script>",
    '"><img src=x onerror="document.title=\'owned\'">',
    "</script><script>document.title='owned'</script>",
    "</style><svg onload=alert(1)>",
    "</pre></details><iframe src='javascript:alert(1)'></iframe>",
    "[click](javascript:alert(1)) ![](http://127.0.0.1:9/pixel.png)",
    "' onmouseover='alert(1)",
    "{{ 7 * 7 }} {% include 'x' %} ${7*7}",
    "<base href='http://127.0.0.1:9/'><link rel=stylesheet href='//127.0.0.1:9/x'>",
    "<meta http-equiv=refresh content='0;url=http://127.0.0.1:9/'>",
    "<!-- --!> <![CDATA[ <form action=//127.0.0.1:9><input autofocus onfocus=alert(1)>",
    "&lt;b&gt; &#60;script&#62;",
)


class Elements(HTMLParser):
    """Counts elements and collects attributes and the text outside scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._raw = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._raw = tag in ("script", "style")
        if tag in ("td", "th", "tspan"):
            self.text += " "

    def handle_endtag(self, tag: str) -> None:
        self._raw = False

    def handle_data(self, data: str) -> None:
        if not self._raw:
            self.text += data


def text_of(html: str) -> str:
    """The page's text, with every run of blanks as one space."""
    return re.sub(r"\s+", " ", Elements(html).text)


def section(html: str, name: str) -> str:
    """The text of one section."""
    found = re.search(rf'<section id="{name}".*?</section>', html, re.S)
    assert found is not None, name
    return text_of(found.group())


def small_run() -> Run:
    return Run(kept=[a_row(0, "Ulm")], prompts=[a_prompt()])


def attacked_run() -> Run:
    """Every attack in every place that data can reach."""
    run = Run()
    for number, attack in enumerate(ATTACKS):
        row = a_row(
            number,
            attack,
            prompt_set=attack,
            prompt_id=attack,
            task=attack,
            prompt=(Message(attack, attack),),
            completion=(Message("assistant", attack, reasoning_content=attack),),
            answer=attack,
            teacher=attack,
            license_set=(attack,),
            also_in=(attack,),
            finish_reason=attack,
            flags=(attack,),
        )
        run.kept.append(row)
        run.rejected.setdefault("filter", []).append((replace(row, row_id=f"{number:032x}"), attack))
    run.evaluation = copy.deepcopy(EVALUATION)
    run.evaluation.update(engine=ATTACKS[0], metric=ATTACKS[1], precision=ATTACKS[2])
    run.evaluation["base"].update(method=ATTACKS[0], methods=dict.fromkeys(ATTACKS, 0.1))
    run.evaluation["teacher"]["by_task"] = {attack: {"n": 1, "accuracy": 0.5} for attack in ATTACKS}
    run.sources = {
        attack: dict.fromkeys(("source", "revision", "license", "description"), attack) for attack in ATTACKS
    }
    run.metrics = {"generate": {"teachers": {"tiny": dict.fromkeys(TEACHER, ATTACKS[1])}}}
    return run


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> str:
    _, html = write_report(attacked_run(), tmp_path_factory.mktemp("attacked"), sample_rows=2 * len(ATTACKS))
    return html


# -------------------------------------------------------------------------------------------------- the stage


def test_the_stage_reads_nothing_outside_the_store(tmp_path: Path) -> None:
    assert report.input_files(ReportStep(report=ReportConfig(), name="x")) == {}


def test_the_content_is_the_digest_of_the_file_and_every_shown_row_is_counted(tmp_path: Path) -> None:
    result, html = write_report(ordinary_run(), tmp_path, sample_rows=10)
    assert result.content == hashlib.sha256(html.encode()).hexdigest()
    assert (result.rows_in, result.rows_out, result.rejected) == (10, 10, {})
    assert html.count('<details>\n<summary><span class="chip') == 10


def test_equal_artefacts_give_equal_bytes_wherever_they_lie(tmp_path: Path) -> None:
    first, _ = write_report(ordinary_run(), tmp_path / "here")
    second, html = write_report(ordinary_run(), tmp_path / "elsewhere" / "deep")
    assert first.content == second.content
    assert str(tmp_path) not in html


def test_library_versions_and_hosts_are_not_in_the_bytes(tmp_path: Path) -> None:
    inputs = write_run(small_run(), tmp_path)
    pages = []
    for version in ("3.11", "3.12"):
        for folder in inputs.values():
            change_manifest(folder, versions={"python": version, "host": f"host-{version}"})
        out = tmp_path / f"out-{version}"
        out.mkdir()
        report.run(ReportStep(report=ReportConfig(), name="x"), inputs, out, make_context(tmp_path))
        pages.append((out / "report.html").read_bytes())
    assert pages[0] == pages[1]


def test_a_signal_stops_the_stage_between_shards(tmp_path: Path) -> None:
    inputs = write_run(small_run(), tmp_path)
    ctx = make_context(tmp_path)
    ctx.cancel.set()
    with pytest.raises(Interrupted):
        report.run(ReportStep(report=ReportConfig(), name="x"), inputs, tmp_path, ctx)


def test_a_damaged_upstream_file_is_named(tmp_path: Path) -> None:
    inputs = write_run(small_run(), tmp_path)
    (inputs["evaluate"] / "evaluation.json").write_text("{", "utf-8")
    with pytest.raises(CorruptArtefact, match=r"evaluation\.json"):
        report.run(ReportStep(report=ReportConfig(), name="x"), inputs, tmp_path, make_context(tmp_path))


# --------------------------------------------------------------------------------------------------- security


def test_no_text_of_a_model_prompt_or_source_becomes_markup(tmp_path: Path, attacked: str) -> None:
    _, clean = write_report(ordinary_run(), tmp_path)
    known, found = Elements(clean), Elements(attacked)
    assert set(found.tags) <= set(known.tags)
    assert found.tags.count("script") == found.tags.count("style") == 1
    assert {name for name, _ in found.attributes} <= {name for name, _ in known.attributes}
    assert not [name for name, _ in found.attributes if name.startswith("on") or name in ("src", "style", "action")]
    assert {value for name, value in found.attributes if name == "href"} == {
        value for name, value in known.attributes if name == "href"
    }


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_shown_as_the_text_it_is(attacked: str, attack: str) -> None:
    assert Elements(attacked).text.count(attack) >= 6


def test_the_policy_allows_exactly_the_two_own_blocks(tmp_path: Path) -> None:
    _, html = write_report(small_run(), tmp_path)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)
    assert policy is not None
    rules = policy.group(1).replace("&#39;", "'")
    assert rules.startswith("default-src 'none'; ")
    assert "unsafe" not in rules
    assert "http" not in rules


def test_the_page_names_no_address_on_the_network(tmp_path: Path) -> None:
    _, html = write_report(ordinary_run(), tmp_path)
    assert re.findall(r"(?:https?:)?//[a-z]", html) == []


def test_characters_that_cannot_be_seen_are_shown(tmp_path: Path) -> None:
    run = Run(kept=[a_row(0, "a\u202eb\x1b[31m\x00c\u200bd")])
    _, html = write_report(run, tmp_path)
    shown = section(html, "samples")
    assert all(mark in shown for mark in ("aU+202Eb", "␛[31m␀c", "U+200Bd"))
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\u200b]", html)


def test_long_text_is_cut_and_says_by_how_much(tmp_path: Path) -> None:
    _, html = write_report(Run(kept=[a_row(0, "x" * 2500)]), tmp_path)
    assert "x" * 2000 in html
    assert "x" * 2001 not in html
    assert "… 500 more characters" in section(html, "samples")


# ------------------------------------------------------------------------------------------------- evaluation


def test_the_verdict_gives_accuracy_size_and_speed(tmp_path: Path) -> None:
    _, html = write_report(small_run(), tmp_path)
    assert (
        "The student keeps 98.1 % (95 % CI 97.0–99.2) of its teacher’s accuracy at 1/7.5 of its parameters "
        "and answers 1.9 × as fast." in text_of(html)
    )
    assert "training closed 97.8 % (96.6–99.0) of the gap" in text_of(html)


def test_a_teacher_behind_an_api_has_no_size_and_no_speed(tmp_path: Path) -> None:
    run = small_run()
    run.evaluation = copy.deepcopy(EVALUATION)
    run.evaluation["teacher"].update(parameters=None, bytes=None, answers_per_second=None, answers_per_second_passes=[])
    _, html = write_report(run, tmp_path)
    assert "of its teacher’s accuracy. Before" in text_of(html)
    shown = section(html, "evaluation")
    assert "Teacher 95.3 % 94.4–96.2 – – –" in shown
    assert "– means not known" in shown


def test_a_teacher_that_is_never_right_leaves_nothing_to_compare(tmp_path: Path) -> None:
    run = small_run()
    run.evaluation = copy.deepcopy(EVALUATION)
    run.evaluation.update(retained=None, retained_ci95=None, gap_closed=None, gap_closed_ci95=None)
    _, html = write_report(run, tmp_path)
    assert "The student answers 93.5 % of 2,104 test prompts correctly" in text_of(html)
    assert "not defined" in section(html, "evaluation")


def test_a_student_no_better_than_its_base_is_called_that(tmp_path: Path) -> None:
    run = small_run()
    run.evaluation = copy.deepcopy(EVALUATION)
    run.evaluation.update(gap_closed=-0.02, gap_closed_ci95=[-0.05, 0.01])
    _, html = write_report(run, tmp_path)
    assert "training did not bring it closer to the teacher" in text_of(html)
    assert "−5.0 to 1.0" in section(html, "evaluation")


def test_a_gap_within_the_error_is_not_sold_as_progress(tmp_path: Path) -> None:
    run = small_run()
    run.evaluation = copy.deepcopy(EVALUATION)
    run.evaluation.update(gap_closed=0.02, gap_closed_ci95=[-0.01, 0.05])
    _, html = write_report(run, tmp_path)
    assert "within the error, this may be nothing" in text_of(html)


def test_a_teacher_no_better_than_the_base_leaves_no_gap(tmp_path: Path) -> None:
    run = small_run()
    run.evaluation = copy.deepcopy(EVALUATION)
    run.evaluation["teacher"].update(accuracy=0.1, ci95=[0.09, 0.11])
    run.evaluation.update(gap_closed=1.5, gap_closed_ci95=[1.1, 2.0])
    _, html = write_report(run, tmp_path)
    assert "there is no gap to close" in text_of(html)
    assert "150.0" not in text_of(html)


def test_a_base_without_validation_prompts_was_asked_like_the_student(tmp_path: Path) -> None:
    run = small_run()
    run.evaluation = copy.deepcopy(EVALUATION)
    run.evaluation["base"].update(method="strict", methods={}, methods_n=0)
    _, html = write_report(run, tmp_path)
    assert "no other way of asking was tried" in section(html, "evaluation")


def test_how_it_was_measured_is_told_with_the_numbers(tmp_path: Path) -> None:
    run = small_run()
    run.evaluation = copy.deepcopy(EVALUATION)
    run.evaluation["base"].update(cut=7, prompt_too_long=1)
    _, html = write_report(run, tmp_path)
    shown = section(html, "evaluation")
    assert "(2,000 resamples). Not scored: 12 no_reference." in shown
    assert "median of 3 warm passes over 512 prompts in batches of 64" in shown
    assert "tried on 500 validation prompts" in shown
    assert "Base: 7 answers cut at the cap on tokens and scored as they are, 1 prompt too long for the model." in shown


def test_tasks_have_a_table_only_where_there_are_tasks(tmp_path: Path) -> None:
    _, html = write_report(small_run(), tmp_path / "with")
    assert "capital 1,201 96.1 % 14.8 % 94.4 %" in section(html, "evaluation")
    run = small_run()
    run.evaluation = copy.deepcopy(EVALUATION)
    for role in ("teacher", "base", "student"):
        run.evaluation[role]["by_task"] = {}
    _, html = write_report(run, tmp_path / "without")
    assert "By task" not in section(html, "evaluation")


# -------------------------------------------------------------------------------------- funnel, lengths, loss


def test_the_funnel_adds_up_and_names_every_reason(tmp_path: Path) -> None:
    _, html = write_report(ordinary_run(), tmp_path)
    shown = section(html, "funnel")
    assert "150 train, 18 validation, 40 test" in shown
    assert "filter 165 145 11 wrong_answer 6 finish_reason:length 3 refusal" in shown
    assert "dedup 145 141 4 duplicate_of" in shown
    assert "Rows are missing" not in shown


def test_missing_rows_are_shown_as_missing(tmp_path: Path) -> None:
    inputs = write_run(small_run(), tmp_path)
    change_manifest(inputs["filter"], rows_in=2)
    report.run(ReportStep(report=ReportConfig(), name="x"), inputs, tmp_path, make_context(tmp_path))
    assert "Rows are missing" in section((tmp_path / "report.html").read_text("utf-8"), "funnel")


def test_many_reasons_are_added_up_behind_the_frequent_ones(tmp_path: Path) -> None:
    run = small_run()
    run.rejected["filter"] = [(a_row(10 + n, "x"), f"finish_reason:{n // 2:02d}") for n in range(40)]
    _, html = write_report(run, tmp_path)
    assert "16 8 other reasons" in section(html, "funnel")


def test_lengths_are_tokens_and_rows_without_a_count_are_mentioned(tmp_path: Path) -> None:
    _, html = write_report(ordinary_run(), tmp_path)
    shown = section(html, "lengths")
    assert "Kept 141 rows, median 35 tokens" in shown
    assert "2 rejected rows without a token count" in shown


def test_lengths_are_characters_where_the_teacher_counted_no_tokens(tmp_path: Path) -> None:
    run = Run(kept=[a_row(n, "x" * (n + 1), completion_tokens=None) for n in range(5)])
    measured, without = a_row(9, "é" * 7, completion_tokens=None), a_row(8, "", completion=())
    run.rejected["filter"] = [(measured, "too_long"), (without, "empty")]
    _, html = write_report(run, tmp_path)
    shown = section(html, "lengths")
    assert "Kept 5 rows, median 3 characters" in shown
    assert "Rejected 1 row, median 7 characters" in shown
    assert "1 rejected row without a completion" in shown


def test_a_run_without_rejects_and_without_loss_points_says_so(tmp_path: Path) -> None:
    result, html = write_report(small_run(), tmp_path)
    assert result.rows_out == 1
    assert section(html, "funnel").count("nothing rejected") == 6
    assert "No point of the loss curve" in section(html, "loss")
    assert "kept 1" in section(html, "samples")


def test_no_sample_rows_need_no_script(tmp_path: Path) -> None:
    result, html = write_report(ordinary_run(), tmp_path, sample_rows=0)
    assert result.rows_out == 0
    assert "No rows to show" in section(html, "samples")
    assert "<script" not in html


def test_the_loss_curve_tells_its_ends_and_leaves_out_what_is_not_finite(tmp_path: Path) -> None:
    run = small_run()
    run.loss = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 0.5}]
    run.loss.append({"step": 3, "eval_loss": 0.75})
    _, html = write_report(run, tmp_path)
    shown = section(html, "loss")
    assert "from 2.500 at step 1 to 0.500 at step 3; the last validation loss is 0.750" in shown
    assert "1 point of the curve not finite" in shown


# ---------------------------------------------------------------------------------------- samples and sources


def test_half_of_the_samples_are_kept_rows_and_half_are_spread_over_the_reasons(tmp_path: Path) -> None:
    _, html = write_report(ordinary_run(), tmp_path, sample_rows=14)
    chips = re.findall(r'<summary><span class="chip \w+">(.*?)</span> <span', html)
    found = [text_of(chip).strip() for chip in chips]
    assert found.count("kept") == 7
    assert {
        "generate: content_filter",
        "filter: finish_reason:length",
        "filter: refusal",
        "filter: wrong_answer",
        "dedup: duplicate_of",
        "train: too_long",
    } <= set(found)


def test_a_duplicate_tells_which_row_it_repeats(tmp_path: Path) -> None:
    run = small_run()
    run.rejected["dedup"] = [(a_row(1, "Ulm"), f"duplicate_of:{run.kept[0].row_id}")]
    _, html = write_report(run, tmp_path)
    assert f"left at dedup: duplicate_of:{run.kept[0].row_id}" in section(html, "samples")


def test_unknown_licences_are_marked_for_sets_and_teachers(tmp_path: Path) -> None:
    run = small_run()
    _, html = write_report(run, tmp_path)
    shown = section(html, "sources")
    assert "geography prompt set made for this test 3f2a9c1 CC0-1.0" in shown
    assert f"tiny teacher teacher, local weights {TEACHER['identity'][:12]} Apache-2.0 – 1" in shown
    row = re.search(r"<tr><th[^>]*><bdi>found.*?</tr>", html, re.S)
    assert row is not None
    assert row.group().count("<mark>unknown</mark>") == 2
    assert SOURCES["found"]["license"] == "unknown"


def test_every_step_shows_its_key_and_content(tmp_path: Path) -> None:
    inputs = write_run(small_run(), tmp_path)
    report.run(ReportStep(report=ReportConfig(), name="x"), inputs, tmp_path, make_context(tmp_path))
    html = (tmp_path / "report.html").read_text("utf-8")
    for folder in inputs.values():
        manifest = Manifest.read(folder / "manifest.json")
        assert f'title="{manifest.key}"' in html
        assert f'title="{manifest.content}"' in html
    assert "python -m pipeline run configs/x.yaml" in section(html, "making")

"""Rows to token ids through the student's own chat template: the one code path, whatever tokenizer the teacher had.

A row comes out as ids of which the completion's are trained, and whose text is the completion's byte for byte, or as
the reason why it cannot be trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from pipeline.core.errors import UsageError
from pipeline.student.neutralise import Ids, Neutraliser, Rendered, free_characters, strings_in
from pipeline.student.round_trip import Reader, continues, proven
from pipeline.student.tokenise import Encoded, Messages, RowFacts, encode_texts, render, render_all, template_source
from pipeline.student.turns import (
    Adapter,
    Form,
    Piece,
    Reasoning,
    Turn,
    missing,
    parsed,
    text_bytes,
    trimmed,
)

REASONS: Final = (
    "over_length",
    "unfinished",
    "template_refuses",
    "prompt_not_prefix",
    "reasoning_dropped",
    "round_trip",
    "tool_calls_dropped",
    "fully_masked",
)
"""Why rows of the data set are not trained: the first two by shards.py, the others here."""
BY_PROGRESS: Final = (
    "template_refuses",
    "round_trip",
    "tool_calls_dropped",
    "reasoning_dropped",
    "prompt_not_prefix",
    "fully_masked",
)
ANCHORS: Final = ("", ".", "a", "0")
"""Texts behind which a completion is tokenised where it cannot be behind its prompt."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row before its template: the completion without end tokens, and the ways to hand it over."""

    forms: Sequence[Form]
    tools: Sequence[Any]
    texts: Sequence[str]
    facts: RowFacts

    @property
    def is_plain(self) -> bool:
        """Whether it can be rendered together with others."""
        return len(self.forms) == 1 and self.forms[0].is_plain and not self.tools and self.facts.neutralised == 0


@dataclass(frozen=True, slots=True)
class Draft:
    """A rendered row: what serving sends, and that with the completion."""

    asked: Rendered
    told: Rendered
    pieces: tuple[Piece, ...]
    facts: RowFacts

    @property
    def tail(self) -> Rendered:
        """What the template writes behind the prompt, if that begins the whole."""
        return Rendered(self.told.marked[len(self.asked.marked) :], self.told.markers)

    def flaw(self) -> str | None:
        """Why it cannot be trained, as far as its text tells."""
        is_prefix = self.told.marked.startswith(self.asked.marked)
        lost = missing(self.pieces, self.tail.text if is_prefix else self.told.text)
        if lost is not None:
            return lost
        if not is_prefix:
            return "prompt_not_prefix"
        return "fully_masked" if self.told.marked == self.asked.marked else None


@dataclass(slots=True)
class TextPath:
    """Encodes rows for one student.

    Attributes:
        stops: see `tokenise.stop_ids`.
        tools: JSON text of a row's tools -> their definitions; most rows of a set offer the same.
        refusal: the first error with which the template refused a row.
    """

    tokenizer: Any
    stops: tuple[int, ...]
    adapter: Adapter
    neutraliser: Neutraliser
    reader: Reader
    tools: dict[str, list[Any]] = field(default_factory=dict)
    refusal: UsageError | None = None

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        stops: Sequence[int],
        *,
        reasoning: Reasoning = "template",
        end_tokens: Sequence[str] = (),
    ) -> "TextPath":
        """The path of a tokenizer; see `Adapter` for `reasoning` and `end_tokens`."""
        adapter = Adapter(reasoning, tuple(end_tokens), template_source(tokenizer))
        return cls(tokenizer, tuple(stops), adapter, Neutraliser.of(tokenizer), Reader.of(tokenizer))

    def encode(
        self,
        prompts: Sequence[Messages],
        completions: Sequence[Messages],
        tools: Sequence[str | None] | None = None,
        ends: Sequence[Sequence[str]] | None = None,
    ) -> list[Encoded | str]:
        """Ids and mask of each row, or the reason why it has none.

        `template_refuses`: the template raises an error (roles that do not alternate, no system message).
        `reasoning_dropped`: the template leaves out the completion's thinking.
        `tool_calls_dropped`: it leaves out a call's name or arguments, or refuses the conversation with them.
        `round_trip`: it changes the content, or the ids do not give the completion's bytes back.
        `prompt_not_prefix`: what serving would send does not begin the conversation with its completion.
        `fully_masked`: nothing of the row is the completion's.

        What the template writes behind the last stop token (a newline, say) is left out: no model ever generates it.

        Args:
            prompts, completions: conversations, and the turns that follow them; see `tokenise.plain_messages`.
            tools: JSON text of the functions that each row offers, or None.
            ends: end tokens to cut of each row; None: `end_tokens` of all.
        """
        offered = tools if tools is not None else [None] * len(prompts)
        cut = ends if ends is not None else [None] * len(prompts)
        rows = [self._row(*row) for row in zip(prompts, completions, offered, cut, strict=True)]
        drafts = self._drafts(rows)
        results: list[Encoded | str] = [draft if isinstance(draft, str) else "round_trip" for draft in drafts]
        at = [index for index, draft in enumerate(drafts) if isinstance(draft, Draft)]
        found = self._encoded([draft for draft in drafts if isinstance(draft, Draft)])
        for index, one in zip(at, found, strict=True):
            results[index] = one
        return results

    # ------------------------------------------------------------------------------------------------- messages

    def _row(self, prompt: Messages, completion: Messages, tools: str | None, ends: Sequence[str] | None) -> Row:
        asked, told = [dict(turn) for turn in prompt], [dict(turn) for turn in completion]
        cut, ends_cut = self.adapter.cut(told, ends)
        forms = [*self.adapter.forms(asked, cut)]
        offered = self._offered(tools)
        texts = [*_texts(asked), *_texts(cut), *(() if tools is None else strings_in(offered))]
        facts = RowFacts(
            neutralised=self.neutraliser.count(texts),
            end_tokens_cut=ends_cut,
            end_token_left=self.adapter.ends_alike(cut),
            reasoning_inlined=self.adapter.inlined(cut),
            reasoning_left_out=self.adapter.left_out(cut),
            with_system=any(turn["role"] in ("system", "developer") for turn in asked),
            received_bytes=text_bytes(told),
            completion_bytes=sum(piece.bytes for piece in forms[0].pieces),
        )
        return Row(forms, offered, texts, facts)

    def _offered(self, tools: str | None) -> list[Any]:
        if tools is None:
            return []
        if tools not in self.tools:
            value = parsed(tools)
            self.tools[tools] = value if isinstance(value, list) else []
        return self.tools[tools]

    # -------------------------------------------------------------------------------------------------- template

    def _drafts(self, rows: Sequence[Row]) -> list[Draft | str]:
        plain = [at for at, row in enumerate(rows) if row.is_plain]
        forms = [rows[at].forms[0] for at in plain]
        asked = self._rendered_each([form.prompt for form in forms], add_generation_prompt=True)
        whole_forms = [[*form.prompt, *form.completion] for form in forms]
        told = self._rendered_each(whole_forms, add_generation_prompt=False)
        drafts: list[Draft | str] = ["template_refuses" for _ in rows]
        for at, before, whole in zip(plain, asked, told, strict=True):
            if before is None or whole is None:
                continue
            draft = Draft(Rendered(before), Rendered(whole), rows[at].forms[0].pieces, rows[at].facts)
            drafts[at] = draft.flaw() or draft
        for at, row in enumerate(rows):
            if not row.is_plain:
                drafts[at] = self._draft(row)
        return drafts

    def _rendered_each(self, conversations: Sequence[Messages], *, add_generation_prompt: bool) -> list[str | None]:
        """Their texts; None for those that the template refuses."""
        try:
            return [*render_all(self.tokenizer, conversations, add_generation_prompt=add_generation_prompt)]
        except UsageError as error:
            if len(conversations) == 1:
                self.refusal = self.refusal or error
                return [None]
        half = len(conversations) // 2
        parts = (conversations[:half], conversations[half:])
        return [
            text for part in parts for text in self._rendered_each(part, add_generation_prompt=add_generation_prompt)
        ]

    def _draft(self, row: Row) -> Draft | str:
        """The first form that the template takes whole; else why it does not take the one that came furthest."""
        flaws: list[str] = []
        for form in row.forms:
            try:
                draft = self._rendered(row, form)
            except UsageError as error:
                self.refusal = self.refusal or error
                flaws.append("tool_calls_dropped" if _calls(form) else "template_refuses")
                continue
            flaw = draft.flaw()
            if flaw is None:
                return draft
            flaws.append(flaw)
        return max(flaws, key=BY_PROGRESS.index)

    def _rendered(self, row: Row, form: Form) -> Draft:
        free = free_characters(row.texts)
        marks = self.neutraliser.markers(row.texts, free)
        prompt, completion, tools, inline = self.neutraliser.mark(
            [form.prompt, form.completion, row.tools, [*form.inline.values()]], marks
        )
        places = dict(zip(free, form.inline, strict=False))
        for place, at in places.items():
            completion[at]["content"] = place + (completion[at]["content"] or "")
        asked = render(self.tokenizer, prompt, add_generation_prompt=True, tools=tools)
        told = render(self.tokenizer, [*prompt, *completion], add_generation_prompt=False, tools=tools)
        for place, text in zip(places, inline, strict=True):
            told = _put(told, place, text)
        markers = {marker: text for text, marker in marks.items()}
        return Draft(Rendered(asked, markers), Rendered(told, markers), form.pieces, row.facts)

    # ------------------------------------------------------------------------------------------------------- ids

    def _encoded(self, drafts: Sequence[Draft]) -> list[Encoded | str]:
        asked = self._ids([draft.asked for draft in drafts])
        told = self._ids([draft.told for draft in drafts])
        return [
            "round_trip" if prompt is None or whole is None else self._proven(draft, prompt, whole)
            for draft, prompt, whole in zip(drafts, asked, told, strict=True)
        ]

    def _ids(self, rendered: Sequence[Rendered]) -> list[Ids | None]:
        plain = [at for at, each in enumerate(rendered) if not each.markers]
        marked = [at for at, each in enumerate(rendered) if each.markers]
        ids: list[Ids | None] = [None] * len(rendered)
        for at, one in zip(plain, encode_texts(self.tokenizer, [rendered[at].marked for at in plain]), strict=True):
            ids[at] = one
        for at, other in zip(marked, self.neutraliser.encode([rendered[at] for at in marked]), strict=True):
            ids[at] = other
        return ids

    def _proven(self, draft: Draft, prompt: Ids, whole: Ids) -> Encoded | str:
        if whole[: len(prompt)] != prompt:
            return self._continued(draft, prompt)
        trained = self._cut(whole[len(prompt) :])
        text = proven(self.reader, prompt, trained, draft.tail.text, draft.pieces)
        return "round_trip" if text is None else self._row_of(draft, prompt, trained, text)

    def _continued(self, draft: Draft, prompt: Ids) -> Encoded | str:
        """A row whose completion begins with what the tokenizer would join to the prompt's end (a newline, say).

        Serving sends the prompt alone, so the completion gets ids of its own: behind an anchor, since some tokenizers
        put a space before text that begins.
        """
        for anchor in ANCHORS:
            rendered = [Rendered(anchor + text, draft.tail.markers) for text in ("", draft.tail.marked)]
            before, both = self._ids(rendered)
            if before is None or both is None or both[: len(before)] != before:
                continue
            trained = self._cut(both[len(before) :])
            text = continues(self.reader, prompt, trained, draft.tail.text)
            if text is not None:
                return self._row_of(draft, prompt, trained, text)
        return "round_trip"

    def _cut(self, ids: Ids) -> Ids:
        """The completion's ids up to its last stop token, if only white space follows."""
        for at in range(len(ids) - 1, -1, -1):
            if ids[at] in self.stops:
                rest = ids[at + 1 :]
                return ids[: at + 1] if not rest or not self.reader.read(rest).strip() else ids
        return ids

    def _row_of(self, draft: Draft, prompt: Ids, trained: Ids, text: str) -> Encoded | str:
        if not trained:
            return "fully_masked"
        if draft.facts.neutralised > 0 and self._has_unknown(trained):
            return "round_trip"
        facts = replace(draft.facts, trimmed=True) if trimmed(draft.pieces, text) else draft.facts
        return Encoded((*prompt, *trained), len(prompt), facts)

    def _has_unknown(self, ids: Ids) -> bool:
        unknown = self.tokenizer.unk_token_id
        return unknown is not None and unknown not in self.stops and unknown in ids


def _texts(turns: Sequence[Turn]) -> list[str]:
    return [text for turn in turns for name, value in turn.items() if name != "role" for text in strings_in(value)]


def _calls(form: Form) -> bool:
    return any("tool_calls" in turn for turn in (*form.prompt, *form.completion))


def _put(text: str, place: str, inline: str) -> str:
    """The inline thinking in its place, and in that of an empty thought that the template put there."""
    before, found, after = text.partition(place)
    if not found:
        return text
    bare = before.rstrip()
    if bare.endswith("</think>") and bare.removesuffix("</think>").rstrip().endswith("<think>"):
        before = bare.removesuffix("</think>").rstrip().removesuffix("<think>")
    return before + inline + after

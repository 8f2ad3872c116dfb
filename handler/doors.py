"""The shapes of request and answer: our own, plain text, and KServe's two.

TorchServe 0.12 sends `/predictions/seq2seq`, `/v1/models/seq2seq:predict` and
`/v2/models/seq2seq/infer` to the same handler and does not say which it was, so a body's own
shape is its door. A door takes texts and options out of a body and gives an answer its shape.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from handler.fields import FieldError, named, shown

Fields = dict[str, bytes]  # of a translation, each in JSON: docs/rest.md


@dataclass(frozen=True)
class Told:
    """What a door makes of the translations of one text, in bytes of its body.

    count: translations. values: of each field those of all translations but the last, and that of
    the last; or one piece.
    """

    count: int
    values: dict[str, tuple[bytes, bytes]]

    @property
    def size(self) -> int:
        return sum(len(head) + len(last) for head, last in self.values.values())


class Door:
    """One shape. `mark` is the field that only requests of this shape have."""

    mark: ClassVar[str] = "text"
    streams: ClassVar[bool] = False
    content_type: ClassVar[str] = "application/json"

    @classmethod
    def enter(
        cls, given: Mapping[str, Any], known: Collection[str]
    ) -> "tuple[list[str], dict[str, Any], Door]":
        """Texts, options and the door of a body.

        Args:
            known: names of options.

        Raises:
            FieldError: the field that is not as it should be.
        """
        raise FieldError("text", "missing; allowed: a string or a list of strings")

    def told(self, translations: list[Fields]) -> Told:
        """The translations of one text."""
        pieces: list[bytes] = []
        for one in translations:
            pieces.append(b", {" if pieces else b"[{")
            for place, (name, value) in enumerate(one.items()):
                pieces += [b'%s"%s": ' % (b", " if place else b"", name.encode()), value]
            pieces.append(b"}")
        return Told(len(translations), {"": (b"".join([*pieces, b"]"]), b"")})

    def leave(
        self, texts: list[Told], model: dict[str, str], usage: dict[str, Any]
    ) -> Iterator[bytes]:
        """The body of an answer, in pieces."""
        yield b'{"translations": '
        yield from pieces_of(texts)
        yield b', "model": %s, "usage": %s}' % (spelt(model), spelt(usage))

    def refuse(self, error: Mapping[str, Any]) -> str:
        """The body of an error, {"code", "type", "message"}."""
        return json.dumps(error)


@dataclass(frozen=True)
class Native(Door):
    """`{"text": "..." or ["...", ...], <options>}`."""

    streams = True

    @classmethod
    def enter(
        cls, given: Mapping[str, Any], known: Collection[str]
    ) -> tuple[list[str], dict[str, Any], Door]:
        if "text" not in given:
            raise FieldError("text", "missing; allowed: a string or a list of strings")
        texts = given["text"]
        if isinstance(texts, str):
            texts = [texts]
        options = {key: value for key, value in given.items() if key != "text"}
        return strings(texts, "text", "a string or a list of at least one string"), options, cls()


@dataclass(frozen=True)
class PlainText(Door):
    """One sentence a line in, one a line out."""

    content_type = "text/plain; charset=utf-8"

    def told(self, translations: list[Fields]) -> Told:
        text: str = json.loads(translations[0]["text"])
        return Told(1, {"": (text.replace("\n", " ").encode(), b"\n")})

    def leave(
        self, texts: list[Told], model: dict[str, str], usage: dict[str, Any]
    ) -> Iterator[bytes]:
        for one in texts:
            yield from one.values[""]


@dataclass(frozen=True)
class KServeV1(Door):
    """`{"instances": ["..." or {"text": "..."}, ...], "parameters": {<options>}}`; the answer is
    `{"predictions": [...]}` with the translations of each instance."""

    mark = "instances"

    @classmethod
    def enter(
        cls, given: Mapping[str, Any], known: Collection[str]
    ) -> tuple[list[str], dict[str, Any], Door]:
        only(given, ("instances", "parameters"))
        texts = given["instances"]
        if isinstance(texts, list):
            texts = [
                one["text"] if isinstance(one, Mapping) and list(one) == ["text"] else one
                for one in texts
            ]
        return strings(texts, "instances"), parameters(given), cls()

    def leave(
        self, texts: list[Told], model: dict[str, str], usage: dict[str, Any]
    ) -> Iterator[bytes]:
        yield b'{"predictions": '
        yield from pieces_of(texts)
        yield b"}"

    def refuse(self, error: Mapping[str, Any]) -> str:
        return json.dumps({"error": error["message"], **error})


@dataclass(frozen=True)
class OpenInference(KServeV1):
    """The Open Inference Protocol v2: one input tensor of BYTES [N] or [N, 1]; the answer has a
    tensor [N, n_best] for each thing told of a translation.

    Its parameters are an open list: a server takes those that it knows. The others are ignored, and
    the answer names them.

    wanted: names of the output tensors asked for, in their order; empty for all.
    ignored: names of parameters, with their places.
    """

    mark = "inputs"
    id: str | None = None
    wanted: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    @classmethod
    def enter(
        cls, given: Mapping[str, Any], known: Collection[str]
    ) -> tuple[list[str], dict[str, Any], Door]:
        only(given, ("id", "inputs", "outputs", "parameters"))
        name = given.get("id")
        if name is not None and not is_name(name):
            raise FieldError("id", f"got {shown(name)}; allowed: Unicode, at most 256 characters")
        inputs = given["inputs"]
        if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], Mapping):
            raise FieldError("inputs", f"got {shown(inputs)}; allowed: a list of one tensor")
        texts = texts_of(inputs[0])
        wanted, ignored = wanted_of(given.get("outputs"))
        options = parameters(given)
        others = [one for one in options if one not in known]
        others += [f"inputs[0].{one}" for one in parameters(inputs[0], "inputs[0].")]
        options = {key: one for key, one in options.items() if key in known}
        options |= {option: True for one in wanted if (option := OUTPUTS[one]) is not None}
        return texts, options, cls(name, wanted, tuple(map(named, [*others, *ignored])))

    def told(self, translations: list[Fields]) -> Told:
        """Of each field, which is an output; what is neither text nor number is JSON in a
        string."""
        values = {}
        for name in translations[0]:
            each = [one[name] for one in translations]
            if name in NESTED:
                each = [spelt(value.decode()) for value in each]
            values[name] = b"".join(value + b", " for value in each[:-1]), each[-1]
        return Told(len(translations), values)

    def leave(
        self, texts: list[Told], model: dict[str, str], usage: dict[str, Any]
    ) -> Iterator[bytes]:
        most = max(one.count for one in texts)
        name, version = spelt(model["name"]), spelt(model["version"])
        yield b'{"model_name": %s, "model_version": %s, "outputs": [' % (name, version)
        fields = {"translation" if one == "text" else one: one for one in texts[0].values}
        for number, told in enumerate(self.wanted or fields):
            yield b", " if number else b""
            field, kind = fields[told], "FP32" if told == "score" else "BYTES"
            head = {"name": told, "shape": [len(texts), most], "datatype": kind}
            yield spelt(head)[:-1] + b', "data": ['
            for i, one in enumerate(texts):
                first, last = one.values[field]
                yield b", " if i else b""
                yield first
                yield last
                # Every text has equally many: what a beam did not find is filled with its last.
                for _ in range(most - one.count):
                    yield b", "
                    yield last
            yield b"]}"
        yield b"]" if self.id is None else b'], "id": %s' % spelt(self.id)
        if self.ignored:
            yield b', "parameters": %s' % spelt({"ignored": ", ".join(self.ignored)})
        yield b"}"


DOORS: tuple[type[Door], ...] = (Native, KServeV1, OpenInference)


NESTED = ("tokens", "alignment")  # fields that are neither text nor number


def pieces_of(texts: list[Told]) -> Iterator[bytes]:
    """A list in JSON of what has one value."""
    between = b"["
    for one in texts:
        yield between
        yield from one.values[""]
        between = b", "
    yield b"]"


def spelt(value: object) -> bytes:
    """A value in JSON."""
    return json.dumps(value, ensure_ascii=False).encode()


# Output tensors, and the option that has each told; None: always.
OUTPUTS: Mapping[str, str | None] = {
    "translation": None,
    "score": "return_scores",
    "tokens": "return_tokens",
    "alignment": "return_alignments",
    "finish_reason": None,
}


def texts_of(tensor: Mapping[str, Any]) -> list[str]:
    """The texts of an input tensor."""
    only(tensor, ("name", "shape", "datatype", "parameters", "data"), "inputs[0]")
    if tensor.get("datatype") != "BYTES":
        raise FieldError(
            "inputs[0].datatype", f"got {shown(tensor.get('datatype'))}; allowed: 'BYTES'"
        )
    data = tensor.get("data")
    if isinstance(data, list) and data and all(isinstance(row, list) for row in data):
        data = [one for row in data for one in row]
    texts = strings(data, "inputs[0].data")
    shape = tensor.get("shape")
    exact = isinstance(shape, list) and all(type(one) is int for one in shape)
    if not exact or shape not in ([len(texts)], [len(texts), 1]):
        raise FieldError(
            "inputs[0].shape",
            f"got {shown(shape)}; allowed for {len(texts)} strings: [{len(texts)}] or "
            f"[{len(texts)}, 1]",
        )
    return texts


def wanted_of(outputs: object) -> tuple[tuple[str, ...], list[str]]:
    """The names of the output tensors that are asked for, each once, and their parameters, of which
    none is known."""
    if outputs is None:
        return (), []
    if not isinstance(outputs, list) or not all(isinstance(one, Mapping) for one in outputs):
        raise FieldError("outputs", f"got {shown(outputs)}; allowed: a list of tensors")
    ignored: list[str] = []
    for i, one in enumerate(outputs):
        only(one, ("name", "parameters"), f"outputs[{i}]")
        name = one.get("name")
        if not isinstance(name, str) or name not in OUTPUTS:
            allowed = ", ".join(OUTPUTS)
            raise FieldError(f"outputs[{i}].name", f"got {shown(name)}; allowed: {allowed}")
        ignored += [f"outputs[{i}].{key}" for key in parameters(one, f"outputs[{i}].")]
    return tuple(dict.fromkeys(one["name"] for one in outputs)), ignored


def strings(
    given: object, where: str, allowed: str = "a list of at least one string"
) -> list[str]:
    """At least one string, as a list."""
    if not isinstance(given, list) or not given:
        raise FieldError(where, f"got {shown(given)}; allowed: {allowed}")
    for i, one in enumerate(given):
        if not isinstance(one, str):
            raise FieldError(f"{where}[{i}]", f"got {shown(one)}; allowed: a string")
    return given


def is_name(given: object) -> bool:
    if not isinstance(given, str) or len(given) > 256:
        return False
    return not any("\ud800" <= c <= "\udfff" for c in given)


def parameters(given: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """What `parameters` of `given` says; null is as good as none."""
    options = given.get("parameters")
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        problem = f"got {shown(options)}; allowed: a mapping of options, or null"
        raise FieldError(f"{where}parameters", problem)
    return dict(options)


def only(given: Mapping[str, Any], known: tuple[str, ...], where: str = "") -> None:
    for key in given:
        if key not in known:
            name = f"{where}.{shown(key)}" if where else shown(key)
            raise FieldError(name, f"unknown; allowed: {', '.join(known)}")

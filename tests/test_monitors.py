"""A monitor's numbers are those of the replies alone, whatever else is in the batch; AUROC is the share of ordered pairs."""

from typing import Any

import pytest
import torch

from steering_vectors import SteeringVector, auroc, monitor, record_activations
from steering_vectors.demo import tiny_model, tiny_tokenizer


def talk(*words: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": word} for n, word in enumerate(words)]


def test_by_hand() -> None:
    "Found again with the tokenizer's own text and one pass per conversation."
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    v = torch.randn(32, generator=torch.Generator().manual_seed(0))
    words = ["Hi", "Hello", "And?", "zzz!", "Ok", "So be it."]
    found = monitor(model, tokenizer, SteeringVector({0: v, 1: v}), talk(*words))
    text = tokenizer.apply_chat_template(talk(*words), tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", return_offsets_mapping=True)
    with record_activations(model, layer_nums=[0, 1]) as seen, torch.no_grad():
        model(ids["input_ids"])
    for n, word in enumerate(words[1::2]):
        start = text.index(word)
        inside = [start <= a and b <= start + len(word) for a, b in ids["offset_mapping"][0].tolist()]
        for k in (0, 1):
            along = seen[k][0][0] @ v / v.norm()
            assert abs(along[torch.tensor(inside)].mean() - found.values[n, k]) < 1e-5
    usual = [talk("Who?", "Me"), talk("a", "A much longer reply than others.", "b", "B")]
    scaled = monitor(model, tokenizer, SteeringVector({0: v, 1: v}), talk(*words), usual)
    alone = torch.cat([monitor(model, tokenizer, SteeringVector({0: v, 1: v}), each).values for each in usual])
    assert torch.allclose(scaled.values, (found.values - alone.mean(0)) / alone.std(0), atol=1e-4)


def test_auroc_counts_pairs() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randint(0, 9, (40,), generator=g), torch.randint(2, 11, (30,), generator=g)
    pairs = (a[:, None] > b[None]).double() + 0.5 * (a[:, None] == b[None]).double()
    assert abs(auroc(a, b) - float(pairs.mean())) < 1e-12
    with pytest.raises(ValueError, match="NaN"):
        auroc([float("nan")], [1.0])


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        ({"conversation": talk("Hi")}, ValueError, "Conversation 0 of conversation has no reply"),
        (
            {"conversation": [talk("Hi", "Yes"), talk("Hi", "")]},
            ValueError,
            "Conversation 1 of conversation has no reply",
        ),
        ({"ordinary": [talk("Hi", "Yes"), talk("Hi")]}, ValueError, "Conversation 1 of ordinary has no reply"),
        ({"conversation": []}, ValueError, "no conversation to read"),
        ({"conversation": [], "ordinary": [talk("Hi", "Yes")] * 2}, ValueError, "no conversation to read"),
        ({"conversation": "Hi"}, TypeError, "conversation is a list of messages"),
        ({"conversation": [["Hi", "Yes"]]}, TypeError, "conversation is a list of messages"),
        ({"ordinary": None}, TypeError, "or the scale of an earlier result; this is None"),
        ({"ordinary": [talk("Hi", "Yes"), []]}, TypeError, "ordinary is a list of messages"),
    ],
)
def test_what_is_no_conversation_is_refused(how: dict[str, Any], kind: type[Exception], words: str) -> None:
    given = {"conversation": talk("Hi", "Yes"), **how}
    with pytest.raises(kind, match=words):
        monitor(tiny_model("llama"), tiny_tokenizer(), SteeringVector({0: torch.ones(32)}), **given)


def test_one_ordinary_conversation_with_several_replies_is_a_scale() -> None:
    model, tokenizer, v = tiny_model("llama"), tiny_tokenizer(), SteeringVector({0: torch.ones(32)})
    usual = talk("Hi", "Yes", "So?", "No")
    alike = [monitor(model, tokenizer, v, usual, ordinary).values for ordinary in (usual, [usual])]
    assert torch.equal(*alike)


def test_an_empty_reply_keeps_its_number() -> None:
    "It has no tokens, so no number; the replies behind it keep theirs."
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    v = SteeringVector({0: torch.randn(32, generator=torch.Generator().manual_seed(0))})
    for words in (["a", "One", "b", "", "c", "Two", "d", ""], ["a", "", "b", "One"], ["a", "One", "b", "", "c"]):
        if len(words) % 2:
            with pytest.warns(UserWarning, match="header"):
                found = monitor(model, tokenizer, v, talk(*words))
        else:
            found = monitor(model, tokenizer, v, talk(*words))
        replies = words[1::2]
        assert found.texts == tuple(replies)
        assert found.values.isnan()[:, 0].tolist() == [word == "" for word in replies]
        rows = str(found).splitlines()[1:]
        assert [row.split()[0] for row in rows] == [str(n) for n in range(len(replies))]
        assert ["(empty)" in row for row in rows] == [word == "" for word in replies]
        text = tokenizer.apply_chat_template(talk(*words), tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", return_offsets_mapping=True)
        with record_activations(model, layer_nums=[0]) as seen, torch.no_grad():
            model(ids["input_ids"])
        along = seen[0][0][0] @ v.layer_activations[0] / v.layer_activations[0].norm()
        for n, word in enumerate(replies):
            if word:
                start = text.index(word)
                inside = [start <= a and b <= start + len(word) for a, b in ids["offset_mapping"][0].tolist()]
                assert abs(along[torch.tensor(inside)].mean() - found.values[n, 0]) < 1e-5


def test_the_scale_is_used_again() -> None:
    "Ordinary replies are read once; many conversations in one call are those of many calls."
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    g = torch.Generator().manual_seed(0)
    v = SteeringVector({n: torch.randn(32, generator=g) for n in (0, 1)})
    talks = [talk("Hi", "Hello", "And?", "zzz!"), talk("Ok", "So be it.", "b", "", "c", "C"), talk("Who?", "I")]
    usual = [talk("Who?", "Me"), talk("a", "A much longer reply than others.", "b", "B", "c", "")]
    first = monitor(model, tokenizer, v, talks[0], usual)
    assert first.scale is not None and first.scaled
    passes = []
    hook = model.register_forward_pre_hook(lambda module, args: passes.append(1))
    again = monitor(model, tokenizer, v, talks, first.scale)
    hook.remove()
    assert len(passes) == 1, "ordinary replies are not read again"
    for talked, found in zip(talks, again, strict=True):
        alone = monitor(model, tokenizer, v, talked, usual)
        assert found.texts == alone.texts and found.scaled
        assert torch.allclose(found.values, alone.values, atol=1e-4, equal_nan=True)
    values = torch.cat([monitor(model, tokenizer, v, each).values for each in usual])[:3]
    assert torch.allclose(first.scale.mean, values.mean(0), atol=1e-5), "an empty reply is not in the scale"
    assert monitor(model, tokenizer, v, talks[:1])[0].scale is None
    turned = SteeringVector({n: -w for n, w in v.layer_activations.items()})
    for other in (turned, v[0], SteeringVector({0: v.layer_activations[0], 2: v.layer_activations[1]})):
        with pytest.raises(ValueError, match="belongs to another vector"):
            monitor(model, tokenizer, other, talks[0], first.scale)
    same = monitor(model, tokenizer, v.steering(multiplier=3), talks[0], first.scale)
    assert torch.allclose(same.values, first.values, atol=1e-4)

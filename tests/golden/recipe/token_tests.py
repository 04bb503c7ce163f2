"""What the reference tokenizer makes of the corpus: tokens.json."""

import json

from .corpus import REFUSED_CHATS, chats, strings


def write_tokens(path, tokenizer, bos_id, add_bos, lookalikes=()):
    """Encode every string twice and every chat once with `tokenizer`, a transformers fast tokenizer."""
    special_texts = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    document = {
        "bos_id": bos_id,
        "add_bos": add_bos,
        "special_texts": special_texts,
        "strings": [_string(tokenizer, text) for text in strings(special_texts, list(lookalikes))],
        "chats": [_chat(tokenizer, name, messages, special_texts) for name, messages in chats(turn_marks(special_texts)).items()]
        + [_refused_or_chat(tokenizer, name, messages, special_texts) for name, messages in REFUSED_CHATS.items()],
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(document, file, ensure_ascii=True, indent=None, separators=(",", ":"))
        file.write("\n")


def turn_marks(special_texts):
    """The special tokens that open and close a turn: the last pair that a template writes."""
    for pair in (["<|im_start|>", "<|im_end|>"], ["<|start_header_id|>", "<|eot_id|>"], ["<start_of_turn>", "<end_of_turn>"]):
        if all(mark in special_texts for mark in pair):
            return pair
    raise ValueError("no turn marks among the special tokens")


def as_text(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def as_special(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]


def _string(tokenizer, text):
    plain = as_text(tokenizer, text)
    return {
        "text": text,
        "as_text": plain,
        "as_special": as_special(tokenizer, text),
        "decoded": tokenizer.decode(plain, skip_special_tokens=False, clean_up_tokenization_spaces=False),
    }


def _refused_or_chat(tokenizer, name, messages, special_texts):
    try:
        return _chat(tokenizer, name, messages, special_texts)
    except Exception as refusal:  # jinja2's own error type, raised by the template
        return {"name": name, "messages": messages, "error": str(refusal)}


def _chat(tokenizer, name, messages, special_texts):
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    parsed = as_special(tokenizer, text)
    kept = ids_with_message_text_kept_as_text(tokenizer, messages, text, special_texts)
    if not name.startswith("injection"):
        assert parsed == kept, name
        assert parsed == tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True), name
        return {"name": name, "messages": messages, "text": text, "ids": parsed}
    assert parsed != kept, name
    return {"name": name, "messages": messages, "text": text, "ids": kept, "ids_if_message_text_were_parsed": parsed}


def ids_with_message_text_kept_as_text(tokenizer, messages, text, special_texts):
    """Ids of a rendered chat where only the template's own special tokens count as special.

    1. In every message, special-token text is swapped for a stand-in (private-use characters, no white space), so that the
       template's trims and tests see what they would have seen, and the chat is rendered.
    2. The rendering is cut at the special tokens that are left in it: the template wrote those.
    3. In what lies between two cuts the stand-ins become special-token text again, and each such stretch is encoded *whole*
       with special tokens off: template text and message text together, so that words which touch a message's edge are
       split as the reference splits them. Only added tokens that are not special (such as `<think>`) are still matched.
    """
    stand_ins = {text: f"\ue000{chr(0xE100 + index)}\ue001" for index, text in enumerate(special_texts)}
    longest_first = sorted(special_texts, key=len, reverse=True)

    def swap(content):
        for special in longest_first:
            content = content.replace(special, stand_ins[special])
        return content

    def swap_back(stretch):
        for special, stand_in in stand_ins.items():
            stretch = stretch.replace(stand_in, special)
        return stretch

    swapped = [{**message, "content": swap(message["content"])} for message in messages]
    rendered = tokenizer.apply_chat_template(swapped, tokenize=False, add_generation_prompt=True)
    assert swap_back(rendered) == text
    ids, rest = [], rendered
    while rest:
        cuts = [(rest.find(special), -len(special), special) for special in special_texts if special in rest]
        if not cuts:
            ids += as_text(tokenizer, swap_back(rest))
            break
        start, _, special = min(cuts)
        if start:
            ids += as_text(tokenizer, swap_back(rest[:start]))
        ids.append(tokenizer.convert_tokens_to_ids(special))
        rest = rest[start + len(special):]
    return ids

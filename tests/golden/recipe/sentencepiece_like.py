"""A second, independent encoder for GGUF vocabularies of model `llama`, to show that scores and merges agree.

Works from the GGUF file alone: user-defined pieces first (longest at each place), then repeatedly the best-scored
neighbouring pair, then bytes for what is left.
"""

import gguf


def check(path, tokens_document):
    """Every string of `tokens.json` must have the same ids by score as by merge rank."""
    fields = gguf.GGUFReader(path).fields
    tokens, scores, types = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "scores", "token_type"))
    ids = {token: index for index, token in enumerate(tokens)}
    declared = {token for token, kind in zip(tokens, types) if kind == gguf.TokenType.USER_DEFINED}
    control = {token for token, kind in zip(tokens, types) if kind == gguf.TokenType.CONTROL}
    learned = {token for token, kind in zip(tokens, types) if kind == gguf.TokenType.NORMAL}
    for case in tokens_document["strings"]:
        for key, whole in (("as_text", declared), ("as_special", declared | control)):
            made = [i for part, matched in _partition(case["text"], whole)
                    for i in ([ids[part]] if matched else _merge(part, ids, scores, learned))]
            assert made == case[key], (key, case["text"], made, case[key])


def _partition(text, whole):
    """Cut `text` at the pieces of `whole`, leftmost first and longest at each place."""
    parts, plain, place = [], "", 0
    longest_first = sorted(whole, key=len, reverse=True)
    while place < len(text):
        piece = next((p for p in longest_first if text.startswith(p, place)), None)
        if piece is None:
            plain += text[place]
            place += 1
            continue
        if plain:
            parts.append((plain, False))
            plain = ""
        parts.append((piece, True))
        place += len(piece)
    return parts + ([(plain, False)] if plain else [])


def _merge(text, ids, scores, learned):
    symbols = list(text.replace(" ", "\u2581"))
    while True:
        pairs = [(scores[ids[a + b]], -i) for i, (a, b) in enumerate(zip(symbols, symbols[1:])) if a + b in learned]
        if not pairs:
            break
        at = -max(pairs)[1]
        symbols[at:at + 2] = [symbols[at] + symbols[at + 1]]
    made = []
    for symbol in symbols:
        if symbol in learned:
            made.append(ids[symbol])
        else:
            made += [ids[f"<0x{byte:02X}>"] for byte in symbol.encode("utf-8")]
    return made

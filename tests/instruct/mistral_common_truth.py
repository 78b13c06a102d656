"""What mistral-common makes of conversations: run by an interpreter that has it, which may be another than the tests'.

    python mistral_common_truth.py < conversations.json > answers.json

Reads a list of conversations, each a list of {"role", "content"}; writes, for each, the token ids of Mixtral's v1
template and the texts between its control tokens, or null where mistral-common refuses it. With `--tokenizer` it prints
where its tokenizer's file is instead.
"""

import json
import sys

from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from pydantic import ValidationError


def answer(tokenizer, messages):
    try:
        ids = tokenizer.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens
    except (MistralCommonException, ValidationError):
        return None
    pieces = tokenizer.instruct_tokenizer.tokenizer
    texts = [[]]
    for token in ids:
        if pieces.is_special(token):
            texts.append([])
        else:
            texts[-1].append(token)
    return {"ids": ids, "texts": [pieces.decode(part) for part in texts]}


if __name__ == "__main__":
    truth = MistralTokenizer.v1()
    if sys.argv[1:] == ["--tokenizer"]:
        print(truth.instruct_tokenizer.tokenizer.file_path)
    else:
        json.dump([answer(truth, messages) for messages in json.load(sys.stdin)], sys.stdout)

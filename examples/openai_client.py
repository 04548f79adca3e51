"""Ask a server that offloads as any other: nothing of it shows in the API.

vllm serve MODEL --plugin moe-offload --moe-offload-cache 25%
python examples/openai_client.py [--url http://127.0.0.1:8000/v1] [--prompt TEXT]
"""

import argparse

from openai import OpenAI


def main(url: str, prompt: str) -> None:
    client = OpenAI(base_url=url, api_key="none")
    model = client.models.list().data[0].id
    for part in client.completions.create(model=model, prompt=prompt, max_tokens=32, temperature=0, stream=True):
        print(part.choices[0].text, end="", flush=True)
    print()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--prompt", default="def add(a, b):")
    main(**vars(parser.parse_args()))

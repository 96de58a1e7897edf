"""Answers several callers at once in one event loop, each as a stream, and gives up one of them midway.

python examples/many_callers.py --model demo
"""

import argparse
import asyncio

from qwenkern import Model

QUESTIONS = ("What is a prime number?", "Name three rivers.", "Write a haiku about rain.", "Count to one million.")

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="demo")
args = parser.parse_args()


async def answer(model: Model, question: str, most: int = 60) -> str:
    async with model.astream([{"role": "user", "content": question}], temperature=0, max_tokens=most) as stream:
        pieces = [piece async for piece in stream]
    return "".join(pieces)


async def main() -> None:
    with Model.from_pretrained(args.model) as model:
        callers = [asyncio.create_task(answer(model, question)) for question in QUESTIONS[:3]]
        callers.append(asyncio.create_task(answer(model, QUESTIONS[3], most=1000)))
        for question, caller in zip(QUESTIONS[:3], callers[:3], strict=True):  # all four run together
            print(f"{question}\n    {await caller!r}")
        callers[3].cancel()  # its request ends with it
        await asyncio.gather(*callers, return_exceptions=True)
        print(f"{QUESTIONS[3]}\n    cancelled: {callers[3].cancelled()}")


asyncio.run(main())

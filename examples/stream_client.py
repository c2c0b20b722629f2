"""A client of `monarchrt serve`: watches a video, changes its prompt on the way, and keeps the frames as JPEG files.

python examples/stream_client.py http://127.0.0.1:8766/session "a cat" "a dog" --out frames
"""

import argparse
import asyncio
import pathlib

import aiohttp


async def watch(url, prompts, out, *, seconds=3.0, token=""):
    """Frames of each prompt for some seconds of video; how many came."""
    out.mkdir(parents=True, exist_ok=True)
    count = 0
    async with aiohttp.ClientSession() as http, http.ws_connect(url, params={"token": token} if token else {}) as ws:
        fps = (await ws.receive_json())["fps"]
        await ws.send_json({"type": "start", "prompt": prompts.pop(0)})
        async for message in ws:
            if message.type is aiohttp.WSMsgType.BINARY:  # index and block, 4 bytes each, then the picture
                index = int.from_bytes(message.data[:4], "big")
                (out / f"{index:05}.jpg").write_bytes(message.data[8:])
                count += 1
                if count % round(seconds * fps) == 0:
                    await ws.send_json({"type": "prompt", "prompt": prompts.pop(0)} if prompts else {"type": "stop"})
                continue
            event = message.json()
            if event["type"] != "block":
                print(event)
            if event["type"] == "ended":
                break
    return count


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("url")
    options.add_argument("prompts", nargs="+")
    options.add_argument("--out", type=pathlib.Path, default=pathlib.Path("frames"))
    options.add_argument("--token", default="")
    given = options.parse_args()
    asyncio.run(watch(given.url, given.prompts, given.out, token=given.token))

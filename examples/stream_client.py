"""A client of `monarchrt serve`: starts a video, changes its prompt every few blocks, and saves it as an mp4.

python examples/stream_client.py http://127.0.0.1:8766/session cat.mp4 "a cat" "a dog"
"""

import asyncio
import sys

import aiohttp


async def watch(url, file, prompts, *, blocks=8, **options):
    """Writes a video to a file as it arrives; `options` are more fields of `start`. Returns the last event."""
    async with aiohttp.ClientSession() as http, http.ws_connect(url) as ws:
        await ws.send_json({"type": "start", "prompt": prompts.pop(0), "video": "mp4", **options})
        async for message in ws:
            if message.type is aiohttp.WSMsgType.BINARY:  # index and block, 4 bytes each, then a piece of the mp4
                file.write(message.data[8:])
            elif (event := message.json())["type"] in ("ended", "error"):
                return event
            elif event["type"] == "block" and (event["block"] + 1) % blocks == 0:
                await ws.send_json({"type": "prompt", "prompt": prompts.pop(0)} if prompts else {"type": "stop"})
        return {"type": "error", "message": f"the connection is gone ({ws.close_code})"}


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    with open(sys.argv[2], "wb") as video:
        print(asyncio.run(watch(sys.argv[1], video, sys.argv[3:])))

// The connection to /live: kept, watched, and made again when it is lost.

import { ServerError, events, request } from "./api.js";

const SILENCE_MS = 15000; // the server sends something more often than that
const FIRST_WAIT_MS = 500, LONGEST_WAIT_MS = 5000;

// on.event(object), on.state("live" | "lost" | "paused" | "refused", error). Ends only when the key is refused; call again
// then. A page that nobody sees lets go: browsers open few connections to one server.
export async function follow(on) {
  let wait = FIRST_WAIT_MS;
  while (true) {
    if (document.hidden) {
      on.state("paused");
      await change();
      continue;
    }
    try {
      for await (const event of liveEvents()) {
        on.state("live");
        wait = FIRST_WAIT_MS;
        on.event(event);
      }
      on.state("lost", new Error("the server closed the connection"));
    } catch (error) {
      if (document.hidden) continue;
      if (error instanceof ServerError && error.status === 401) {
        on.state("refused", error);
        return;
      }
      on.state("lost", error);
    }
    await new Promise((resolve) => setTimeout(resolve, wait));
    wait = Math.min(LONGEST_WAIT_MS, 2 * wait);
  }
}

const change = () => new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));

async function* liveEvents() {
  const ending = new AbortController();
  const hide = () => document.hidden && ending.abort();
  let timer;
  const heard = () => {
    clearTimeout(timer);
    timer = setTimeout(() => ending.abort(new Error("the server has gone silent")), SILENCE_MS);
  };
  heard();
  document.addEventListener("visibilitychange", hide);
  try {
    for await (const data of events(await request("live", { signal: ending.signal }))) {
      heard();
      if (data !== null) yield JSON.parse(data);
    }
  } finally {
    clearTimeout(timer);
    document.removeEventListener("visibilitychange", hide);
    ending.abort();
  }
}

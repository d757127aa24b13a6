"""A store that answers as Google's does: as much as a run asks of it.

    with fake_gcs.served() as store:       # and child processes find it
      store.objects["bucket/name"]         # -> bytes

JSON API v1 over HTTP: objects whole or in ranges, uploads of three kinds,
lists, deletions one by one and in batches, conditions on generations. After
https://cloud.google.com/storage/docs/json_api/v1.
"""

import contextlib
import email
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from unittest import mock

BUCKET = "bucket"
_PATH = re.compile(
  r"/(?:upload/|download/)?storage/v1/b/(?P<bucket>[^/]+)(?:/o(?:/(?P<name>.+))?)?"
)


class Store:
  """What is kept.

  Attributes:
    objects: "bucket/name" -> bytes.
    refuses: (method, "bucket/name") -> whether that is forbidden.
  """

  def __init__(self):
    self.objects: dict[str, bytes] = {}
    self.refuses: Callable[[str, str], bool] = lambda method, name: False
    self.generations: dict[str, int] = {}
    self.uploads: dict[str, tuple[str, bytes]] = {}
    self.lock = threading.RLock()

  def put(self, key: str, content: bytes) -> None:
    with self.lock:
      self.objects[key] = content
      self.generations[key] = self.generations.get(key, 0) + 1

  def names(self, prefix: str) -> list[str]:
    """Of a folder's objects, such as "bucket/run"."""
    return sorted(key for key in list(self.objects) if key.startswith(prefix))


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  wbufsize = -1  # an answer is one packet: else the next waits for a timer
  disable_nagle_algorithm = True
  store: Store

  def log_message(self, *given):
    pass

  def _answer(self, code, content=b"", **headers):
    if not isinstance(content, bytes):
      content = json.dumps(content).encode()
    self.send_response(code)
    headers.setdefault("Content-Type", "application/json")
    for name, value in headers.items():
      self.send_header(name.replace("_", "-"), str(value))
    self.send_header("Content-Length", str(len(content)))
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(content)

  def _fail(self, code, message):
    self._answer(code, {"error": {"code": code, "message": message}})

  def _handle(self):
    body = self._body()
    url = urllib.parse.urlsplit(self.path)
    asked = dict(urllib.parse.parse_qsl(url.query))
    if url.path.startswith("/batch/"):
      self._batch(body)
      return
    match = _PATH.fullmatch(url.path)
    assert match, self.path
    bucket, name = match["bucket"], urllib.parse.unquote(match["name"] or "")
    name = name or asked.get("name", "")
    key = f"{bucket}/{name}"
    with self.store.lock:
      if self.store.refuses(self.command, key):
        self._fail(403, f"someone does not have access to {key}.")
      elif bucket != BUCKET:
        self._fail(404, "The specified bucket does not exist.")
      elif "/upload/" in self.path:
        self._upload(bucket, key, asked, body)
      elif self.command == "DELETE":
        known = self.store.objects.pop(key, None)
        self._answer(204) if known is not None else self._fail(404, "none")
      elif name:
        self._get(key, asked)
      elif url.path.endswith("/o"):
        self._list(bucket, asked)
      else:
        self._answer(200, {"kind": "storage#bucket", "name": bucket})

  do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _handle

  def _body(self):
    if self.headers.get("Transfer-Encoding") != "chunked":
      return self.rfile.read(int(self.headers.get("Content-Length") or 0))
    parts = []
    while size := int(self.rfile.readline(), 16):
      parts.append(self.rfile.read(size))
      self.rfile.readline()
    self.rfile.readline()
    return b"".join(parts)

  def _about(self, key):
    bucket, _, name = key.partition("/")
    return {
      "kind": "storage#object",
      "bucket": bucket,
      "name": name,
      "size": str(len(self.store.objects[key])),
      "generation": str(self.store.generations[key]),
      "metageneration": "1",
      "timeCreated": "2026-01-01T00:00:00.000Z",
      "updated": "2026-01-01T00:00:00.000Z",
    }

  def _get(self, key, asked):
    content = self.store.objects.get(key)
    if content is None:
      self._fail(404, f"No such object: {key}")
      return
    generation = self.store.generations[key]
    if asked.get("ifGenerationNotMatch") == str(generation):
      self._answer(304)
      return
    if asked.get("ifGenerationMatch", str(generation)) != str(generation):
      self._fail(412, "conditionNotMet")
      return
    if asked.get("alt") != "media":
      self._answer(200, self._about(key))
      return
    told = {
      "x-goog-generation": generation,
      "Content-Type": "application/octet-stream",
    }
    wanted = re.fullmatch(
      r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "-"
    )
    if wanted is None:
      self._answer(200, content, **told)
      return
    size = len(content)
    first, last = wanted[1], wanted[2]
    begin = int(first) if first else max(size - int(last), 0)
    end = min(int(last) + 1, size) if first and last else size
    if begin >= size:
      self._fail(416, "range")
      return
    told["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
    self._answer(206, content[begin:end], **told)

  def _list(self, bucket, asked):
    prefix, cut = asked.get("prefix", ""), asked.get("delimiter")
    start, end = asked.get("startOffset", ""), asked.get("endOffset")
    items, prefixes = [], set()
    for key in self.store.names(f"{bucket}/{prefix}"):
      name = key.removeprefix(f"{bucket}/")
      if name < start or (end and name >= end):
        continue
      rest = name[len(prefix) :]
      if cut and cut in rest:
        prefixes.add(prefix + rest.split(cut)[0] + cut)
      else:
        items.append(self._about(key))
    found = {"kind": "storage#objects", "items": items}
    self._answer(200, {**found, "prefixes": sorted(prefixes)})

  def _upload(self, bucket, key, asked, body):
    kind = asked["uploadType"]
    if kind == "resumable" and "upload_id" not in asked:
      name = asked.get("name") or json.loads(body)["name"]
      number = str(len(self.store.uploads))
      self.store.uploads[number] = f"{bucket}/{name}", b""
      host = f"http://{self.headers['Host']}{self.path.split('?')[0]}"
      where = f"{host}?uploadType=resumable&upload_id={number}"
      self._answer(200, Location=where)
      return
    if kind == "resumable":
      key, before = self.store.uploads[asked["upload_id"]]
      whole = before + body
      self.store.uploads[asked["upload_id"]] = key, whole
      if self.headers.get("Content-Range", "").endswith("/*"):
        self._answer(308, Range=f"bytes=0-{len(whole) - 1}")
        return
      body = whole
    elif kind == "multipart":
      told, content = _parts(self.headers["Content-Type"], body)
      key, body = f"{bucket}/{json.loads(told)['name']}", content
    needed = asked.get("ifGenerationMatch")
    there = key in self.store.objects
    now = self.store.generations[key] if there else 0
    if needed is not None and needed != str(now):
      self._fail(412, "conditionNotMet")
      return
    self.store.put(key, body)
    self._answer(200, self._about(key))

  def _batch(self, body):
    """Deletions, the only calls that come in batches."""
    boundary = "batch"
    parts = []
    for part in _parts(self.headers["Content-Type"], body):
      line = part.decode().split("\n")[0]
      path = urllib.parse.urlsplit(line.split()[1]).path
      match = _PATH.fullmatch(path)
      assert match, line
      assert line.startswith("DELETE"), line
      key = f"{match['bucket']}/{urllib.parse.unquote(match['name'])}"
      with self.store.lock:
        known = self.store.objects.pop(key, None)
      status = "204 No Content" if known is not None else "404 Not Found"
      parts.append(
        f"--{boundary}\r\nContent-Type: application/http\r\n\r\n"
        f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n\r\n"
      )
    whole = "".join(parts) + f"--{boundary}--\r\n"
    kind = f"multipart/mixed; boundary={boundary}"
    self._answer(200, whole.encode(), Content_Type=kind)


def _parts(kind: str, body: bytes) -> list[bytes]:
  """What stands in the parts of a multipart message."""
  message = email.message_from_bytes(
    b"Content-Type: " + kind.encode() + b"\r\n\r\n" + body
  )
  mark = b"--" + str(message.get_boundary()).encode()
  found = []
  for part in body.split(mark)[1:-1]:
    _, _, content = part.replace(b"\r\n", b"\n", 4).partition(b"\n\n")
    content = content.removesuffix(b"\n").removesuffix(b"\r")
    found.append(content)
  return found


@contextlib.contextmanager
def served() -> Iterator[Store]:
  """A store with one empty bucket, which clients find by the environment."""
  store = Store()
  handler = type("Handler", (_Handler,), {"store": store})
  server = http.server.ThreadingHTTPServer(("localhost", 0), handler)
  server.daemon_threads = True
  server.handle_error = lambda *given: None  # clients go, and are killed
  url = f"http://localhost:{server.server_address[1]}"
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  found = {
    "STORAGE_EMULATOR_HOST": url,
    "TENSORSTORE_GCS_HTTP_URL": url,
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks another service
  }
  try:
    with mock.patch.dict("os.environ", found):
      yield store
  finally:
    server.shutdown()
    server.server_close()

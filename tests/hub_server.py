"""A small in-memory Hugging Face Hub on the loopback interface, to upload, list and download models.

The API answers at `http://127.0.0.1:PORT`, and the large file storage at `http://localhost:PORT`. This is another
origin, as on the Hub; otherwise the client would follow its redirects as those of the API and lose their headers.
`HF_ENDPOINT` and `HF_HUB_DISABLE_XET=1` must be set before huggingface_hub is imported. Tests can inject faults,
callables that run before a request (`HubServer.fault`).
"""
import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

LFS_ENDINGS = ('.safetensors', '.bin', '.png')
SIGNATURE = 'X-Signature=secret-of-the-store'

# the licences that this Hub accepts
LICENSES = {'apache-2.0', 'mit', 'cc-by-nc-4.0', 'other'}


@dataclass
class LfsFile:
    """A pointer to an object of the store."""
    sha256: str
    size: int


@dataclass
class Commit:
    """A commit: path -> content of a small file, or a pointer."""
    oid: str
    files: dict[str, bytes | LfsFile]


@dataclass
class Repo:
    """A repository with one branch, main."""
    private: bool
    commits: list[Commit] = field(default_factory=list)

    def find(self, revision: str) -> Commit | None:
        """A commit by id or branch."""
        if revision == 'main':
            return self.commits[-1]
        return next((commit for commit in self.commits if commit.oid == revision), None)

    def add(self, files: dict[str, bytes | LfsFile]) -> Commit:
        """Commit all files of a new tree."""
        content = json.dumps([len(self.commits), sorted((path, repr(file)) for path, file in files.items())])
        self.commits.append(Commit(hashlib.sha1(content.encode()).hexdigest(), files))
        return self.commits[-1]


@dataclass
class Fault:
    """An action that runs before requests whose `METHOD path` matches the pattern."""
    pattern: str
    action: Callable[['Handler'], bool]
    times: int


class HubServer:
    """The server and all of its state.

    Attributes:
        repos: Repository id -> repository.
        objects: SHA-256 -> content; a test may change it to serve wrong content.
        tokens: Token -> role, 'write' or 'read'.
        requests: `METHOD path` of each request, with the range if one is requested, in order.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.tokens: dict[str, str] = {'hf_writetoken': 'write', 'hf_readtoken': 'read'}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self.port = 0
        self.http: ThreadingHTTPServer | None = None
        self.start()

    @property
    def url(self) -> str:
        """The API's address, for HF_ENDPOINT."""
        return f'http://127.0.0.1:{self.port}'

    @property
    def store_url(self) -> str:
        """The object store's address."""
        return f'http://localhost:{self.port}'

    def start(self) -> None:
        """Listen, on the same port as before."""
        self.http = ThreadingHTTPServer(('127.0.0.1', self.port), type('BoundHandler', (Handler,), {'hub': self}))
        self.port = self.http.server_port
        threading.Thread(target=self.http.serve_forever, kwargs={'poll_interval': 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Stop listening: connections are refused from now on."""
        assert self.http is not None
        self.http.shutdown()
        self.http.server_close()

    def reset(self) -> None:
        """Forget everything but the tokens."""
        with self.lock:
            self.repos, self.objects, self.requests, self.faults = {}, {}, [], []

    def fault(self, pattern: str, action: Callable[['Handler'], bool], times: int = 1) -> None:
        """Run an action before the next requests whose `METHOD path` matches the pattern.

        Args:
            pattern: A regular expression, which is searched for.
            action: Called with the request's handler; returns whether it answered, so that the request is not served.
            times: Number of requests that it applies to.
        """
        self.faults.append(Fault(pattern, action, times))

    def publish(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> str:
        """Add files to a repository in one commit, and return its id."""
        repo = self.repos.setdefault(repo_id, Repo(private))
        tree: dict[str, bytes | LfsFile] = dict(repo.commits[-1].files) if repo.commits else {}
        for path, content in files.items():
            tree[path] = self.store(content) if path.endswith(LFS_ENDINGS) else content
        return repo.add(tree).oid

    def store(self, content: bytes) -> LfsFile:
        """Put an object into the store."""
        sha256 = hashlib.sha256(content).hexdigest()
        self.objects[sha256] = content
        return LfsFile(sha256, len(content))

    def count(self, pattern: str) -> int:
        """The number of requests so far that match the pattern."""
        return sum(re.search(pattern, request) is not None for request in self.requests)


def status(code: int, **headers: str) -> Callable[['Handler'], bool]:
    """A fault: answer with an error."""
    def action(handler: 'Handler') -> bool:
        handler.reply(code, b'', {name.replace('_', '-'): value for name, value in headers.items()})
        return True
    return action


def broken_after(count: int, reset: bool) -> Callable[['Handler'], bool]:
    """A fault: announce a whole object, send some bytes of it, then close the connection or reset it."""
    def action(handler: 'Handler') -> bool:
        content = handler.hub.objects[urlsplit(handler.path).path.rsplit('/', 1)[-1]]
        handler.reply(200, content[:count], {'Content-Length': str(len(content))})
        handler.wfile.flush()
        if reset:  # a zero linger time makes close() send RST
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        handler.connection.close()
        return True
    return action


def together(count: int) -> Callable[['Handler'], bool]:
    """A fault: hold requests until `count` of them have arrived, then serve them."""
    barrier = threading.Barrier(count)

    def action(handler: 'Handler') -> bool:
        barrier.wait(timeout=60)
        return False
    return action


def git_hash(content: bytes) -> str:
    """Hash of a git blob."""
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One request."""
    hub: HubServer
    protocol_version = 'HTTP/1.1'

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""

    def handle_one_request(self) -> None:
        """Serve a request; a client that disconnects is not an error."""
        try:
            super().handle_one_request()
        except (ConnectionError, OSError, ValueError):
            self.close_connection = True

    def reply(self, code: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        """Send a complete response and close the connection."""
        self.send_response(code)
        for name, value in {'Content-Length': str(len(content)), 'Connection': 'close', **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.close_connection = True
        if self.command != 'HEAD':
            self.wfile.write(content)

    def json(self, data: Any, code: int = 200) -> None:
        """Send JSON."""
        self.reply(code, json.dumps(data).encode(), {'Content-Type': 'application/json'})

    def error(self, code: int, name: str = '', message: str = '', commit: str = '') -> None:
        """Send an error as the Hub does."""
        headers = {'X-Error-Code': name, 'X-Error-Message': message, 'X-Repo-Commit': commit}
        self.reply(code, json.dumps({'error': message or name}).encode(),
                   {'Content-Type': 'application/json', **{key: value for key, value in headers.items() if value}})

    def body(self) -> bytes:
        """The request's body, chunked or not."""
        if self.headers.get('Transfer-Encoding', '').lower() != 'chunked':
            return self.rfile.read(int(self.headers.get('Content-Length', 0)))
        content = b''
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    @property
    def role(self) -> str:
        """The role of the request's token: 'write', 'read' or ''."""
        return self.hub.tokens.get(self.headers.get('Authorization', '').removeprefix('Bearer '), '')

    def serve(self) -> None:
        """Record the request, and answer it unless a fault does."""
        path = unquote(urlsplit(self.path).path)
        request = f'{self.command} {path} {self.headers.get("Range", "")}'.strip()
        with self.hub.lock:
            self.hub.requests.append(request)
            fault = next((f for f in self.hub.faults if f.times and re.search(f.pattern, request)), None)
            if fault:
                fault.times -= 1
        if not (fault and fault.action(self)):
            self.route()

    def route(self) -> None:
        """Answer the request."""
        path = unquote(urlsplit(self.path).path)
        for method, pattern, serve in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                serve(self, **match.groupdict())
                return
        self.error(404, message=f'no route for {self.command} {path}')

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def repo(self, repo_id: str) -> Repo | None:
        """A repository that the request's token may see; otherwise, answer with the Hub's error."""
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self.role):
            self.error(404 if self.role else 401, 'RepoNotFound', 'Repository not found')
            return None
        return repo

    def commit_of(self, repo_id: str, revision: str) -> Commit | None:
        """A commit; if there is none, answer with the Hub's error."""
        repo = self.repo(repo_id)
        commit = repo.find(revision) if repo else None
        if repo and commit is None:
            self.error(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        return commit

    def may_write(self) -> bool:
        """Whether the token may write; if not, answer with the Hub's error."""
        if self.role != 'write':
            self.error(403 if self.role else 401, message='You need a token with write rights' if self.role else
                       'Invalid username or password.')
        return self.role == 'write'

    def whoami(self) -> None:
        """GET /api/whoami-v2."""
        if not self.role:
            return self.error(401, message='Invalid username or password.')
        self.json({'type': 'user', 'name': 'owner', 'orgs': [], 'auth': {'accessToken': {'role': self.role}}})

    def create(self) -> None:
        """POST /api/repos/create."""
        data = json.loads(self.body())
        if not self.may_write():
            return
        repo_id = f'{data.get("organization") or "owner"}/{data["name"]}'
        with self.hub.lock:
            exists = repo_id in self.hub.repos
            if not exists:
                private = data.get('private') is True or data.get('visibility') == 'private'
                self.hub.repos[repo_id] = Repo(private)
                self.hub.repos[repo_id].add({'.gitattributes': b'*.safetensors filter=lfs diff=lfs merge=lfs -text\n'})
        self.json({'url': f'{self.hub.url}/{repo_id}', 'name': repo_id, 'error': 'exists'}, 409 if exists else 200)

    def validate_yaml(self) -> None:
        """POST /api/validate-yaml: front matter must have an accepted licence and a well-formed model-index."""
        content = json.loads(self.body())['content']
        match = re.match(r'---\n(.*?)\n---\n', content, re.DOTALL)
        data = yaml.safe_load(match[1]) if match else {}
        errors = [] if data.get('license') in LICENSES else [f'license {data.get("license")!r} is not known']
        for result in [result for model in data.get('model-index', []) for result in model['results']]:
            errors += [f'a result lacks {key}' for key in ('task', 'dataset', 'metrics') if key not in result]
            errors += [f'a metric lacks {key}' for metric in result.get('metrics', []) for key in ('type', 'value')
                       if key not in metric]
        self.json({'errors': [{'message': error} for error in errors], 'warnings': []}, 400 if errors else 200)

    def preupload(self, repo_id: str, revision: str) -> None:
        """POST .../preupload: how to send each file, and the hashes of those that exist."""
        files = json.loads(self.body())['files']
        commit = self.commit_of(repo_id, revision)
        if commit is None or not self.may_write():
            return
        answers = []
        for info in files:
            there = commit.files.get(info['path'])
            oid = there.sha256 if isinstance(there, LfsFile) else there and git_hash(there)
            mode = 'lfs' if info['path'].endswith(LFS_ENDINGS) else 'regular'
            answers.append({'path': info['path'], 'uploadMode': mode, 'shouldIgnore': False, 'oid': oid})
        self.json({'files': answers, 'commitOid': commit.oid})

    def lfs_batch(self, repo_id: str) -> None:
        """POST .../info/lfs/objects/batch: where to upload the missing objects."""
        objects = json.loads(self.body())['objects']
        if self.repo(repo_id) is None or not self.may_write():
            return
        answers = []
        for info in objects:
            answers.append({'oid': info['oid'], 'size': info['size']})
            if info['oid'] not in self.hub.objects:
                upload = {'href': f'{self.hub.store_url}/objects/{info["oid"]}?{SIGNATURE}'}
                answers[-1]['actions'] = {'upload': upload}
        self.json({'transfer': 'basic', 'objects': answers})

    def put_object(self, sha256: str) -> None:
        """PUT of an object, whose content must match its name."""
        content = self.body()
        if hashlib.sha256(content).hexdigest() != sha256:
            return self.error(400, message='wrong content')
        self.hub.objects[sha256] = content
        self.reply(200, b'')

    def get_object(self, sha256: str) -> None:
        """GET of an object, or of the rest of one."""
        content = self.hub.objects.get(sha256)
        if content is None:
            return self.error(404, message='no such object')
        match = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
        start = int(match[1]) if match else 0
        self.reply(206 if match else 200, content[start:],
                   {'Content-Range': f'bytes {start}-{len(content) - 1}/{len(content)}'} if match else {})

    def commit(self, repo_id: str, revision: str) -> None:
        """POST .../commit: NDJSON of a header and of files."""
        items = [json.loads(line) for line in self.body().splitlines()]
        if self.commit_of(repo_id, revision) is None or not self.may_write():
            return
        repo = self.hub.repos[repo_id]
        with self.hub.lock:
            head = repo.commits[-1]
            files = dict(head.files)
            for item in items:
                value = item['value']
                if item['key'] == 'header' and value.get('parentCommit', head.oid) != head.oid:
                    return self.error(412, message='A commit has happened since. Please refresh and try again.')
                if item['key'] == 'file':
                    files[value['path']] = base64.b64decode(value['content'])
                if item['key'] == 'lfsFile':
                    if value['oid'] not in self.hub.objects:
                        return self.error(400, message='LFS pointer points to a file that does not exist')
                    files[value['path']] = LfsFile(value['oid'], value['size'])
                if item['key'] == 'deletedFile':
                    del files[value['path']]
            oid = repo.add(files).oid
        self.json({'success': True, 'commitOid': oid, 'commitUrl': f'{self.hub.url}/{repo_id}/commit/{oid}'})

    def model_info(self, repo_id: str, revision: str = 'main') -> None:
        """GET /api/models/ID[/revision/REV]."""
        commit = self.commit_of(repo_id, revision)
        if commit is not None:
            self.json({
                'id': repo_id, 'modelId': repo_id, 'sha': commit.oid, 'tags': [], 'downloads': 0, 'likes': 0,
                'private': self.hub.repos[repo_id].private, 'siblings': [{'rfilename': p} for p in commit.files]})

    def tree(self, repo_id: str, revision: str) -> None:
        """GET /api/models/ID/tree/REV."""
        commit = self.commit_of(repo_id, revision)
        if commit is not None:
            self.json([_tree_entry(path, file) for path, file in commit.files.items()])

    def missing(self, repo_id: str, revision: str) -> None:
        """GET of a folder that no model has."""
        commit = self.commit_of(repo_id, revision)
        if commit is not None:
            self.error(404, 'EntryNotFound', 'no such folder', commit.oid)

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        """GET or HEAD of a file: its content, or a redirect to the store."""
        commit = self.commit_of(repo_id, revision)
        if commit is None:
            return
        file = commit.files.get(path)
        if file is None:
            self.error(404, 'EntryNotFound', 'Entry not found', commit.oid)
        elif isinstance(file, LfsFile):
            self.reply(302, b'', {
                'X-Repo-Commit': commit.oid, 'X-Linked-Etag': f'"{file.sha256}"', 'X-Linked-Size': str(file.size),
                'Location': f'{self.hub.store_url}/objects/{file.sha256}?{SIGNATURE}'})
        else:
            self.reply(200, file, {'X-Repo-Commit': commit.oid, 'ETag': f'"{git_hash(file)}"'})


def _tree_entry(path: str, file: bytes | LfsFile) -> dict[str, Any]:
    if isinstance(file, LfsFile):
        lfs = {'oid': file.sha256, 'size': file.size, 'pointerSize': 134}
        return {'type': 'file', 'path': path, 'size': file.size, 'oid': file.sha256[:40], 'lfs': lfs}
    return {'type': 'file', 'path': path, 'size': len(file), 'oid': git_hash(file)}


_ID = r'(?P<repo_id>[^/]+/[^/]+?)'
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ('GET', '/api/whoami-v2', Handler.whoami),
    ('POST', '/api/repos/create', Handler.create),
    ('POST', '/api/validate-yaml', Handler.validate_yaml),
    ('POST', f'/api/models/{_ID}/preupload/(?P<revision>[^/]+)', Handler.preupload),
    ('POST', rf'/{_ID}\.git/info/lfs/objects/batch', Handler.lfs_batch),
    ('PUT', r'/objects/(?P<sha256>\w+)', Handler.put_object),
    ('GET HEAD', r'/objects/(?P<sha256>\w+)', Handler.get_object),
    ('POST', f'/api/models/{_ID}/commit/(?P<revision>[^/]+)', Handler.commit),
    ('GET', f'/api/models/{_ID}', Handler.model_info),
    ('GET', '/api/models/(?P<repo_id>[^/]+)', Handler.model_info),  # a name without its owner
    ('GET', f'/api/models/{_ID}/revision/(?P<revision>[^/]+)', Handler.model_info),
    ('GET', f'/api/models/{_ID}/tree/(?P<revision>[^/]+)', Handler.tree),
    ('GET', f'/api/models/{_ID}/tree/(?P<revision>[^/]+)/.+', Handler.missing),
    ('GET HEAD', f'/{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)', Handler.resolve),
]

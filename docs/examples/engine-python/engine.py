#!/usr/bin/python3
"""A storage engine for Quarry in Python: a directory on a local file system.

It keeps every rule of docs/ENGINES.md with nothing but grpcio and protobuf, and is made to be
read, and to be taken as a beginning. The order is: how a directory keeps slabs and tags
(Directory), what the engine protocol asks for (Engine), how that is served (serve).

    protoc -I pkg/engine/enginepb --python_out=docs/examples/engine-python engine.proto
    /usr/bin/python3 docs/examples/engine-python/engine.py --socket /run/example/engine.sock

A domain has one parameter, path: an existing directory, in which are

    slabs/<id>        a sparse file (kind block), or a folder with spec and data/ (kind tree)
    tags/<name>       a line with the slab's ID, the record's length and a CRC-32, and the record
    tmp/              what is not finished, and trees that are being removed
    reserve/          room for deleting on a full disk

Everything is made in tmp/, synced, put under its name in one step that fails when the name is
taken, and then the folder is synced. So it has happened or it has not, whatever ends the process.
"""

import argparse
import contextlib
import errno
import fcntl
import inspect
import os
import re
import secrets
import shutil
import signal
import stat
import sys
import threading
import time
import zlib
from concurrent import futures

import grpc
from google.protobuf import any_pb2

import engine_pb2 as pb

RELEASE = "1"
PROTOCOL = 1

GRANULARITY = 4096  # of block slabs, in bytes
MAX_SIZE = 2**63 - GRANULARITY
MAX_RECORD = 640
NAME = re.compile(rb"[a-z0-9][a-z0-9._-]{0,199}")
PAGE = 1000  # tags or slabs in a message: gRPC takes 4 MiB, and a tag has about 1 KiB

RESERVE = 16  # files of 64 KiB
LEFT_OVER = 60  # seconds after which what nobody holds in tmp/ is left over from a crash


class Fault(Exception):
    """An error with one of gRPC's codes. The table is in engine.proto."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


def invalid(message):
    return Fault(grpc.StatusCode.INVALID_ARGUMENT, message)


def exists(message):
    return Fault(grpc.StatusCode.ALREADY_EXISTS, message)


def no_slab(slab):
    return Fault(grpc.StatusCode.NOT_FOUND, "slab %r does not exist" % slab)


def fault_of(error):
    """What a system call's error means. What is not known is UNAVAILABLE, never a guess. ENOENT is
    not NOT_FOUND: the file system may have been unmounted."""
    code = {
        errno.ENOSPC: grpc.StatusCode.RESOURCE_EXHAUSTED,
        errno.EDQUOT: grpc.StatusCode.RESOURCE_EXHAUSTED,
        errno.EACCES: grpc.StatusCode.PERMISSION_DENIED,
        errno.EPERM: grpc.StatusCode.PERMISSION_DENIED,
        errno.EROFS: grpc.StatusCode.PERMISSION_DENIED,
        errno.EFBIG: grpc.StatusCode.OUT_OF_RANGE,
    }.get(error.errno, grpc.StatusCode.UNAVAILABLE)
    return Fault(code, str(error))


def check_name(what, name):
    if not NAME.fullmatch(name.encode()):
        raise invalid("%s %.60r is not allowed: 1 to 200 characters of [a-z0-9._-], beginning with a letter or digit" % (what, name))


def sync(path):
    """Makes a directory's entries, or a file, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def locked(path):
    """Keeps others out who lock the same file, threads and processes alike."""
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        os.close(fd)


class Directory:
    """Slabs and tags in a directory. It keeps nothing in memory: any number of processes may
    have the same one open."""

    def __init__(self, path):
        if not os.path.isabs(path):
            raise invalid("parameter path is %r: the absolute path of an existing directory is needed" % path)
        if not os.path.isdir(path):
            raise invalid("parameter path is %r: there is no such directory: create it, or mount its file system" % path)
        self.path = path
        self.held = os.open(path, os.O_RDONLY | os.O_DIRECTORY)  # so that it is not unmounted
        for name in ("slabs", "tags", "tmp", "reserve"):
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.at(name), 0o700)
        sync(path)
        self.remove_left_overs()
        self.fill_reserve()

    def close(self):
        os.close(self.held)

    def at(self, *names):
        return os.path.join(self.path, *names)

    # Making and removing.

    @contextlib.contextmanager
    def temporary(self, make):
        """A new thing in tmp/, which is removed at the end unless it was renamed. Whoever cleans up
        leaves it alone while it is locked."""
        path = self.at("tmp", secrets.token_hex(16))
        make(path)
        try:
            with locked(path):
                yield path
        finally:
            self.discard(path)

    def discard(self, path):
        """What stays in tmp/ is removed some time later: it has no say in what has happened."""
        with contextlib.suppress(OSError):
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)

    def remove_left_overs(self):
        for name in os.listdir(self.at("tmp")):
            path = self.at("tmp", name)
            with contextlib.suppress(FileNotFoundError, BlockingIOError):  # somebody else was faster, or holds it
                if time.time() - os.lstat(path).st_mtime < LEFT_OVER:
                    continue
                fd = os.open(path, os.O_RDONLY)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self.discard(path)
                finally:
                    os.close(fd)

    def commit(self, folder):
        """Makes durable what has happened. It cannot be called off any more: whatever fails here, the
        outcome is unknown."""
        try:
            sync(self.at(folder))
        except OSError as error:
            raise Fault(grpc.StatusCode.UNAVAILABLE, "whether %s is durable is not known: %s" % (self.at(folder), error)) from error

    def place_file(self, folder, name, fill):
        """Makes a file under its name; FileExistsError: that is taken. link(2) is what makes it
        exclusive, on any number of hosts."""
        def make(path):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))

        with self.temporary(make) as path:
            with open(path, "r+b", buffering=0) as file:
                fill(file)
                os.fsync(file.fileno())
            os.link(path, self.at(folder, name))
        self.commit(folder)

    def fill_reserve(self):
        """Deleting a volume creates a tag first, so a full disk must have room for some."""
        for n in range(RESERVE):
            path = self.at("reserve", str(n))
            if os.path.exists(path):
                continue
            try:
                with open(path, "wb") as file:
                    os.posix_fallocate(file.fileno(), 0, 64 << 10)
            except OSError:  # the disk is still full
                with contextlib.suppress(OSError):
                    os.unlink(path)
                return

    def give_up_reserve(self):
        for name in os.listdir(self.at("reserve")):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.at("reserve", name))
                return True
        return False

    # Slabs.

    def create_slab(self, slab, kind, size, params):
        check_name("slab ID", slab)
        if kind not in (pb.KIND_BLOCK, pb.KIND_TREE):
            raise invalid("slab %r: kind %d is unknown: 1 (block) or 2 (tree)" % (slab, kind))
        if size <= 0:
            raise invalid("slab %r: size %d: it must be greater than zero" % (slab, size))
        for name in params:
            raise invalid("slab %r: parameter %r is unknown: there are none" % (slab, name))
        if kind == pb.KIND_BLOCK:
            if size > MAX_SIZE:
                raise Fault(grpc.StatusCode.OUT_OF_RANGE, "slab %r: size %d: at most %d bytes are possible" % (slab, size, MAX_SIZE))
            size = -(-size // GRANULARITY) * GRANULARITY
        while True:
            try:
                if kind == pb.KIND_BLOCK:
                    self.place_file("slabs", slab, lambda file: file.truncate(size))
                else:
                    self.place_tree(slab, size)
                return
            except FileExistsError:
                pass
            have = self.slab(slab)
            if have == (kind, size):
                return self.commit("slabs")  # its reply was lost
            if have:  # else it was deleted just now
                raise exists("slab %r exists with kind %d and size %d, not %d and %d" % (slab, *have, kind, size))

    def place_tree(self, slab, size):
        with self.temporary(lambda path: os.mkdir(path, 0o700)) as path:
            data = os.path.join(path, "data")
            os.mkdir(data)
            os.chmod(data, 0o755)  # whatever the umask
            sync(data)
            self.write_spec(path, size)
            try:
                os.rename(path, self.at("slabs", slab))
            except OSError as error:  # the other one's data/ makes a rename onto it fail
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise FileExistsError(slab) from error
                raise
        self.commit("slabs")

    def write_spec(self, tree, size):
        new = os.path.join(tree, "spec.new")
        with open(new, "wb") as file:
            file.write(b"%d\n" % size)
            file.flush()
            os.fsync(file.fileno())
        os.rename(new, os.path.join(tree, "spec"))
        sync(tree)

    def slab(self, slab):
        """Kind and size, or None. DATA_LOSS: what is there is not what was made."""
        path = self.at("slabs", slab)
        try:
            info = os.lstat(path)
            if stat.S_ISREG(info.st_mode) and info.st_size > 0 and info.st_size % GRANULARITY == 0:
                return pb.KIND_BLOCK, info.st_size
            if stat.S_ISDIR(info.st_mode) and stat.S_ISDIR(os.lstat(os.path.join(path, "data")).st_mode):
                with open(os.path.join(path, "spec"), "rb") as file:
                    return pb.KIND_TREE, int(file.read())
        except FileNotFoundError:
            if not os.path.lexists(path):
                os.stat(self.at("slabs"))  # is the file system there?
                return None
        except ValueError:
            pass
        raise Fault(grpc.StatusCode.DATA_LOSS, "%s is not a slab as it was made" % path)

    def found(self, slab):
        check_name("slab ID", slab)
        have = self.slab(slab)
        if not have:
            raise no_slab(slab)
        return have

    def resize_slab(self, slab, size):
        self.found(slab)
        path = self.at("slabs", slab)
        with locked(path):  # of several growths at once none undoes another
            kind, present = self.found(slab)
            if size <= present:
                return
            if kind == pb.KIND_TREE:
                self.write_spec(path, size)
                return
            if size > MAX_SIZE:
                raise Fault(grpc.StatusCode.OUT_OF_RANGE, "slab %r: size %d: at most %d bytes are possible" % (slab, size, MAX_SIZE))
            with open(path, "r+b", buffering=0) as file:
                file.truncate(-(-size // GRANULARITY) * GRANULARITY)
                os.fsync(file.fileno())

    def delete_slab(self, slab):
        check_name("slab ID", slab)
        trash = self.at("tmp", secrets.token_hex(16))
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.at("slabs", slab), trash)  # a tree goes in one step, and its content afterwards
        self.commit("slabs")
        self.discard(trash)
        self.fill_reserve()

    def list_slabs(self):
        for name in os.listdir(self.at("slabs")):
            try:
                have = self.slab(name)
            except Fault:  # damaged, but there
                tree = os.path.isdir(self.at("slabs", name))
                have = pb.KIND_TREE if tree else pb.KIND_BLOCK, 0 if tree else os.lstat(self.at("slabs", name)).st_size
            if have:  # else it was deleted meanwhile
                yield pb.Slab(id=name, kind=have[0], size=have[1])

    def attach_slab(self, slab):
        """The path is the same on every call and needs no work, so there is nothing to detach."""
        kind, _ = self.found(slab)
        path = self.at("slabs", slab)
        return path if kind == pb.KIND_BLOCK else os.path.join(path, "data")

    # Tags.

    def create_tag(self, name, slab, record):
        check_name("tag name", name)
        if slab:
            check_name("slab ID", slab)
        if len(record) > MAX_RECORD:
            raise invalid("the record of tag %r has %d bytes: at most %d are allowed" % (name, len(record), MAX_RECORD))
        while True:
            try:
                return self.place_file("tags", name, lambda file: file.write(tag_content(slab, record)))
            except FileExistsError:
                pass
            except OSError as error:
                if error.errno != errno.ENOSPC or not self.give_up_reserve():
                    raise
                continue
            have = self.tag(name)
            if have and not have.unreadable and (have.slab, have.record) == (slab, record):
                return self.commit("tags")  # its reply was lost
            if have:  # else it was deleted just now
                raise exists("tag %r is taken by another record" % name)

    def tag(self, name):
        try:
            with open(self.at("tags", name), "rb") as file:
                line, _, record = file.read().partition(b"\n")
        except FileNotFoundError:
            return None
        slab = line.split(b" ")[0].decode(errors="replace")
        if tag_content(slab, record) != line + b"\n" + record:
            return pb.Tag(name=name, unreadable=True)  # its existence is never hidden
        return pb.Tag(name=name, slab=slab, record=record)

    def delete_tag(self, name):
        check_name("tag name", name)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.at("tags", name))
        self.commit("tags")
        self.fill_reserve()

    def list_tags(self, prefix):
        for name in os.listdir(self.at("tags")):
            if name.startswith(prefix):
                have = self.tag(name)
                if have:  # else it was deleted meanwhile
                    yield have

    # The capability "meter".

    def domain_usage(self):
        f = os.statvfs(self.path)
        return pb.UsageResponse(total=f.f_blocks * f.f_frsize, used=(f.f_blocks - f.f_bfree) * f.f_frsize, available=f.f_bavail * f.f_frsize,
                                inodes_total=f.f_files, inodes_free=f.f_ffree)

    def slab_usage(self, slab):
        kind, size = self.found(slab)
        if kind == pb.KIND_TREE:
            return pb.UsageResponse(declined=True)  # it would have to be walked
        used = min(os.stat(self.at("slabs", slab)).st_blocks * 512, size)
        return pb.UsageResponse(total=size, used=used, available=size - used)


def tag_content(slab, record):
    line = b"%s %d " % (slab.encode(), len(record))
    return line + b"%08x\n" % zlib.crc32(line + record) + record


class Engine:
    """The services of engine.proto: each method has the name that it has there."""

    def __init__(self):
        self.lock = threading.Lock()
        self.domains = {}  # what Open answered: (client, params, Directory)

    def directory(self, request):
        with self.lock:
            if request.domain in self.domains:
                return self.domains[request.domain][2]
        raise Fault(grpc.StatusCode.UNAVAILABLE, "domain %r is not open here: call Open" % request.domain)

    def Open(self, request):
        if PROTOCOL not in request.versions:
            raise Fault(grpc.StatusCode.UNIMPLEMENTED, "the client speaks versions %s of the engine protocol, this engine speaks %d only" % (list(request.versions), PROTOCOL))
        if not request.client:
            raise invalid("client is empty: a name that stays the same is needed")
        params = dict(request.params)
        for name in params:
            if name != "path":
                raise invalid('parameter %r is unknown: only "path" is known' % name)
        for name in request.secrets:
            raise invalid("secret %r is unknown: there are none" % name)
        directory = Directory(params.get("path", ""))
        domain = secrets.token_hex(8)
        with self.lock:
            before = [(key, had) for key, (client, had, _) in self.domains.items() if client == request.client]
            for key, had in before:
                if had == params:
                    domain = key  # it is open: the client was restarted, or has a new connection
                self.domains.pop(key)[2].close()
            self.domains[domain] = (request.client, params, directory)
        return pb.OpenResponse(version=PROTOCOL, domain=domain, engine="python-dir", release=RELEASE, capabilities=["meter"])

    def Close(self, request):
        with self.lock:
            if request.domain in self.domains:
                self.domains.pop(request.domain)[2].close()
        return pb.CloseResponse()

    def Describe(self, request):
        return pb.DescribeResponse(kinds=[pb.KIND_BLOCK, pb.KIND_TREE], granularity=GRANULARITY, zeroed_space=True,
                                   location=self.directory(request).path, notes=["for local file systems: on those of a network nobody has tried it"])

    def CreateSlab(self, request):
        spec = request.spec
        self.directory(request).create_slab(spec.id, spec.kind, spec.size, spec.params)
        return pb.CreateSlabResponse()

    def ResizeSlab(self, request):
        self.directory(request).resize_slab(request.id, request.size)
        return pb.ResizeSlabResponse()

    def DeleteSlab(self, request):
        self.directory(request).delete_slab(request.id)
        return pb.DeleteSlabResponse()

    def ListSlabs(self, request):
        for page in pages(self.directory(request).list_slabs()):
            yield pb.ListSlabsResponse(slabs=page)

    def CreateTag(self, request):
        self.directory(request).create_tag(request.tag.name, request.tag.slab, request.tag.record)
        return pb.CreateTagResponse()

    def DeleteTag(self, request):
        self.directory(request).delete_tag(request.name)
        return pb.DeleteTagResponse()

    def ListTags(self, request):
        for page in pages(self.directory(request).list_tags(request.prefix)):
            yield pb.ListTagsResponse(tags=page)

    def AttachSlab(self, request):
        return pb.AttachSlabResponse(path=self.directory(request).attach_slab(request.id))

    def DetachSlab(self, request):
        self.directory(request)
        check_name("slab ID", request.id)
        return pb.DetachSlabResponse()

    def DomainUsage(self, request):
        return self.directory(request).domain_usage()

    def SlabUsage(self, request):
        return self.directory(request).slab_usage(request.id)


def pages(items):
    page = []
    for item in items:
        page.append(item)
        if len(page) == PAGE:
            yield page
            page = []
    if page:
        yield page


def field(number, content):
    """A field of bytes in a protocol buffer; content is shorter than 16 KiB."""
    length = bytes([len(content)]) if len(content) < 128 else bytes([len(content) % 128 + 128, len(content) // 128])
    return bytes([number << 3 | 2]) + length + content


def full(message):
    """The status detail that tells a full storage from a limit of gRPC's own: a
    google.rpc.Status with a google.rpc.ErrorInfo of the domain "quarry.dev"."""
    info = any_pb2.Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=field(1, b"FULL") + field(2, b"quarry.dev"))
    code = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    return bytes([1 << 3, code]) + field(2, message.encode()) + field(3, info.SerializeToString())


def abort(context, error):
    if isinstance(error, OSError):
        error = fault_of(error)
    if not isinstance(error, Fault):
        print("engine.py: %s: %s" % (type(error).__name__, error), file=sys.stderr, flush=True)
        error = Fault(grpc.StatusCode.INTERNAL, "%s: %s" % (type(error).__name__, error))
    message = str(error)[:1000]
    if error.code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        context.set_trailing_metadata((("grpc-status-details-bin", full(message)),))
    context.abort(error.code, message)


def unary(method):
    def handle(request, context):
        try:
            return method(request)
        except Exception as error:
            abort(context, error)
    return handle


def stream(method):
    def handle(request, context):
        try:
            yield from method(request)
        except Exception as error:
            abort(context, error)
    return handle


def handlers(engine):
    """Each service of engine.proto with those of its methods that the engine has. gRPC answers
    UNIMPLEMENTED to the others."""
    for service in pb.DESCRIPTOR.services_by_name.values():
        methods = {}
        for m in service.methods:
            do = getattr(engine, m.name, None)
            if do is None:
                continue
            coding = {"request_deserializer": getattr(pb, m.input_type.name).FromString, "response_serializer": getattr(pb, m.output_type.name).SerializeToString}
            if inspect.isgeneratorfunction(do):
                methods[m.name] = grpc.unary_stream_rpc_method_handler(stream(do), **coding)
            else:
                methods[m.name] = grpc.unary_unary_rpc_method_handler(unary(do), **coding)
        if methods:
            yield grpc.method_handlers_generic_handler(service.full_name, methods)
    # grpc.health.v1, of which this is all: HealthCheckResponse{status: SERVING}.
    yield grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": grpc.unary_unary_rpc_method_handler(lambda request, context: b"\x08\x01")})


def serve():
    parser = argparse.ArgumentParser(description="A storage engine for Quarry that keeps domains in directories.")
    parser.add_argument("--socket", required=True, help="the absolute path of the Unix socket to listen on")
    socket = parser.parse_args().socket
    if not os.path.isabs(socket):
        parser.error("--socket %r: the absolute path of a socket is needed" % socket)
    os.umask(0o077)  # the socket is for this user only: whoever may use it may do anything
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=32))
    server.add_generic_rpc_handlers(tuple(handlers(Engine())))
    if not server.add_insecure_port("unix:" + socket):
        sys.exit("engine.py: cannot listen on %s" % socket)
    end = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: end.set())
    server.start()
    print("engine.py: serving on %s" % socket, file=sys.stderr, flush=True)
    end.wait()
    server.stop(10).wait()  # what is being answered is finished
    with contextlib.suppress(FileNotFoundError):
        os.unlink(socket)


if __name__ == "__main__":
    serve()

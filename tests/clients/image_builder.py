"""A client of builder.ImageBuilder as another language's gRPC makes it from the protocol: grpcio, generated when it runs.

    image_builder.py PROTO_FOLDER ADDRESS BASE_REFERENCE REPOSITORY_URI

Runs every call as Gitpod's clients do, and ends with an error at the first answer that is another than theirs would expect.
"""

import os
import sys
import tempfile

import grpc
from grpc_tools import protoc

SECONDS = 120


def generated(protos):
    """The modules of the protocol, compiled from the .proto files."""
    folder = tempfile.mkdtemp(prefix="kiln-grpc-")
    files = ["builder/imgbuilder.proto", "contentservice/initializer.proto"]
    includes = ["-I" + protos, "-I" + os.path.join(os.path.dirname(protoc.__file__), "_proto")]
    outputs = ["--python_out=" + folder, "--grpc_python_out=" + folder]
    if protoc.main(["protoc"] + includes + outputs + files) != 0:
        sys.exit("the protocol does not compile")
    sys.path.insert(0, folder)
    from builder import imgbuilder_pb2, imgbuilder_pb2_grpc
    from contentservice import initializer_pb2

    return imgbuilder_pb2, imgbuilder_pb2_grpc, initializer_pb2


def expect(condition, what):
    if not condition:
        sys.exit("not as expected: %s" % (what,))


def refused(call, code, beginning):
    """A call, or the stream that it gives, ends with this code and text."""
    try:
        answer = call()
        if hasattr(answer, "__iter__"):
            list(answer)
    except grpc.RpcError as error:
        expect(error.code() == code and error.details().startswith(beginning), error)
        return
    sys.exit("not refused with %s" % (code,))


def main(protos, address, base, repository):
    pb, services, content = generated(protos)
    # As Gitpod's server keeps its connection alive.
    options = [("grpc.keepalive_time_ms", 60_000), ("grpc.keepalive_timeout_ms", 10_000)]
    channel = grpc.insecure_channel(address, options=options)
    client = services.ImageBuilderStub(channel)

    resolved = client.ResolveBaseImage(pb.ResolveBaseImageRequest(ref=base), timeout=SECONDS).ref
    expect("@sha256:" in resolved, resolved)
    refused(
        lambda: client.ResolveBaseImage(pb.ResolveBaseImageRequest(ref=base + "-nowhere"), timeout=SECONDS),
        grpc.StatusCode.NOT_FOUND,
        "cannot resolve image",
    )

    git = content.GitInitializer(
        remote_uri=repository,
        target_mode=content.CloneTargetMode.Value("REMOTE_BRANCH"),
        clone_taget="main",
        checkout_location="repo",
    )
    dockerfile = pb.BuildSourceDockerfile(
        source=content.WorkspaceInitializer(git=git),
        dockerfile_version="abc",
        dockerfile_path="repo/Dockerfile",
        context_path="repo",
    )
    source = pb.BuildSource(file=dockerfile)
    auth = pb.BuildRegistryAuth(total=pb.BuildRegistryAuthTotal(allow_all=True))
    question = pb.ResolveWorkspaceImageRequest(source=source, auth=auth)
    image = client.ResolveWorkspaceImage(question, timeout=SECONDS)
    expect(image.status == pb.unknown and image.ref, image)

    request = pb.BuildRequest(source=source, auth=auth, triggered_by="ann")
    stream = client.Build(request, timeout=SECONDS)
    first = next(stream)
    # The first message alone tells Gitpod's server that a build is needed.
    expect(first.status == pb.running and first.ref == image.ref and first.info.build_id, first)
    listed = client.ListBuilds(pb.ListBuildsRequest(), timeout=SECONDS).builds
    expect([build.build_id for build in listed] == [first.info.build_id], listed)
    # As gpctl asks: by the ref.
    chunks = client.Logs(pb.LogsRequest(build_ref=image.ref, censored=True), timeout=SECONDS)
    log = b"".join(chunk.content for chunk in chunks)
    expect(b"hello from the build" in log and image.ref.encode() not in log, log)
    rest = list(stream)
    expect(rest and rest[-1].status == pb.done_success and rest[-1].ref == image.ref, rest)
    told = [response.info.log_info for response in rest if response.info.HasField("log_info")]
    expect(told and told[0].url and told[0].headers["x-gitpod-owner-token"], rest)
    expect(all(response.status == pb.running for response in rest[:-1]), rest)

    # There it is: one message, without info.
    again = list(client.Build(request, timeout=SECONDS))
    expect(len(again) == 1 and again[0].status == pb.done_success and not again[0].HasField("info"), again)
    image = client.ResolveWorkspaceImage(question, timeout=SECONDS)
    expect(image.status == pb.done_success and image.ref == again[0].ref, image)
    expect(not client.ListBuilds(pb.ListBuildsRequest(), timeout=SECONDS).builds, "a build goes on")

    refused(
        lambda: client.Build(pb.BuildRequest(), timeout=SECONDS),
        grpc.StatusCode.INVALID_ARGUMENT,
        "build source is missing",
    )
    refused(
        lambda: client.Logs(pb.LogsRequest(build_id="nothing"), timeout=SECONDS),
        grpc.StatusCode.NOT_FOUND,
        "build not found",
    )
    print("every call is answered as expected")


if __name__ == "__main__":
    main(*sys.argv[1:])

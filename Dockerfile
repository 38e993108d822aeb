# One image for every part of Quarry. The programs are those that Quarry calls:
# "hack/deps --print node" lists their packages, and test/image compares.
# hack/image builds this where no registry can be reached.
FROM golang:1.26-bookworm AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY cmd cmd
COPY pkg pkg
ARG VERSION=dev
RUN CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=${VERSION}" \
      -o /out/ ./cmd/quarry ./cmd/kubectl-quarry

FROM debian:bookworm-slim
ARG VERSION=dev
LABEL org.opencontainers.image.title="quarry" \
      org.opencontainers.image.description="CSI driver that gives every storage the same full set of volume features" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="https://github.com/quarry-csi/quarry" \
      org.opencontainers.image.version="${VERSION}"
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      btrfs-progs \
      ca-certificates \
      cryptsetup-bin \
      dmsetup \
      e2fsprogs \
      glusterfs-client \
      kmod \
      lvm2 \
      mount \
      thin-provisioning-tools \
      util-linux \
      xfsprogs \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/log/*
COPY --from=build /out/quarry /out/kubectl-quarry /usr/local/bin/
COPY LICENSE /usr/share/doc/quarry/
# Nobody, unless a pod says otherwise: the agent of a node has to be root, and says so.
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/quarry"]
CMD ["--help"]

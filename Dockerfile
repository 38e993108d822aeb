# One image for every part of Quarry. The programs are those that package host
# calls; hack/deps has the same list.
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
RUN apt-get update \
 && apt-get install -y --no-install-recommends \
      btrfs-progs ca-certificates cryptsetup-bin e2fsprogs mount util-linux xfsprogs \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build /out/quarry /out/kubectl-quarry /usr/local/bin/
COPY LICENSE /usr/share/doc/quarry/
ENTRYPOINT ["/usr/local/bin/quarry"]
CMD ["--help"]

// Package enginepb is the engine protocol as Go code, made of engine.proto.
package enginepb

//go:generate ../../../hack/protoc engine.proto

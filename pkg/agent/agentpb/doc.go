// Package agentpb is the link's protocol as Go code, made of agent.proto.
package agentpb

//go:generate ../../../hack/protoc agent.proto

package main

import (
	"context"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// spans is a real OTLP endpoint that keeps the names of what it is sent.
type spans struct {
	collector.UnimplementedTraceServiceServer
	mu    sync.Mutex
	names []string
}

func (s *spans) Export(_ context.Context, r *collector.ExportTraceServiceRequest) (*collector.ExportTraceServiceResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, rs := range r.ResourceSpans {
		for _, ss := range rs.ScopeSpans {
			for _, span := range ss.Spans {
				s.names = append(s.names, span.Name)
			}
		}
	}
	return &collector.ExportTraceServiceResponse{}, nil
}

func TestCallsAreTracedWhereTheEnvironmentNamesACollector(t *testing.T) {
	needRoot(t, "quarry standalone")
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	got, server := &spans{}, grpc.NewServer()
	collector.RegisterTraceServiceServer(server, got)
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(server.Stop)
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://"+listener.Addr().String())

	p := newPlace(t, oneDomain)
	r := begin(t, "Serving CSI", p.args()...)
	conn, err := grpc.NewClient("unix://"+p.dir+"/csi.sock", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, err := csipb.NewIdentityClient(conn).Probe(ctx, &csipb.ProbeRequest{}); err != nil {
		t.Fatal(err)
	}
	r.stop(t) // sends what was not sent yet
	got.mu.Lock()
	defer got.mu.Unlock()
	if !slices.Contains(got.names, "csi.v1.Identity/Probe") {
		t.Errorf("spans %v, want one of the call\n%s", got.names, r.said())
	}
}

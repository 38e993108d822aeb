package main

import (
	"context"
	"os"
	"time"

	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"

	"go.opentelemetry.io/otel/attribute"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// tracingGrace is how long the last spans may take to be sent.
const tracingGrace = 3 * time.Second

// tracing sends spans of CSI calls to the collector that OpenTelemetry's own
// environment variables name (OTEL_EXPORTER_OTLP_ENDPOINT and its kin); without
// them there are no spans, and the provider is nil.
func tracing(ctx context.Context, nodeID string) (trace.TracerProvider, func(), error) {
	if os.Getenv("OTEL_EXPORTER_OTLP_ENDPOINT") == "" && os.Getenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") == "" {
		return nil, func() {}, nil
	}
	exporter, err := otlptracegrpc.New(ctx) // does not wait for the collector
	if err != nil {
		return nil, nil, fault.New(fault.Invalid, "tracing: %w; see the OTEL_EXPORTER_OTLP_ variables", err)
	}
	about, err := resource.New(ctx, resource.WithAttributes(
		attribute.String("service.name", "quarry"), attribute.String("service.version", version), attribute.String("service.instance.id", nodeID),
	), resource.WithFromEnv())
	if err != nil {
		return nil, nil, fault.New(fault.Invalid, "tracing: %w; see OTEL_RESOURCE_ATTRIBUTES", err)
	}
	provider := sdktrace.NewTracerProvider(sdktrace.WithBatcher(exporter), sdktrace.WithResource(about))
	return provider, func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), tracingGrace)
		defer cancel()
		_ = provider.Shutdown(ctx) // spans that a dead collector misses are nobody's loss
	}, nil
}

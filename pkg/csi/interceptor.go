package csi

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"path"
	"runtime/debug"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/fault/rpcfault"
)

func newCallHistogram() *prometheus.HistogramVec {
	return prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "quarry_csi_call_duration_seconds",
		Help: "Duration of CSI calls by method and gRPC code.",
		// 1 ms to 8 minutes: from an answer out of the index to a long copy.
		Buckets: prometheus.ExponentialBuckets(0.001, 2, 20),
	}, []string{"method", "code"})
}

// intercept wraps every call: it gives the call an ID and a logger, catches
// panics, translates the error, counts and logs.
func (s *Server) intercept(base klog.Logger) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		method := path.Base(info.FullMethod)
		log := klog.LoggerWithValues(base, "method", method, "request", requestID())
		ctx = klog.NewContext(ctx, log)
		log.V(4).Info("Call", "content", redacted{req})

		began := time.Now()
		reply, err := guard(ctx, log, req, handler)
		took := time.Since(began)

		code := rpcfault.CodeName(err)
		if s.calls != nil {
			s.calls.WithLabelValues(method, code).Observe(took.Seconds())
		}
		switch {
		case err == nil:
			log.V(2).Info("Call done", "took", took)
			log.V(4).Info("Reply", "content", redacted{reply})
			return reply, nil
		case fault.KindOf(err) == fault.Internal || fault.KindOf(err) == fault.Corrupt:
			log.Error(err, "Call failed", "code", code, "took", took)
		default:
			log.Info("Call refused", "code", code, "reason", err.Error(), "took", took)
		}
		return nil, rpcfault.ToCSI(err)
	}
}

// guard turns a panic into an error: a bug in one call must not end the calls
// of other volumes.
func guard(ctx context.Context, log klog.Logger, req any, handler grpc.UnaryHandler) (reply any, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fault.New(fault.Internal, "a bug in Quarry: %v (the log has its place)", p)
			log.Error(err, "Panic", "stack", string(debug.Stack()))
		}
	}()
	return handler(ctx, req)
}

func requestID() string {
	var b [6]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	return hex.EncodeToString(b[:])
}

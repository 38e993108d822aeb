package csi

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"path"
	"runtime/debug"
	"strings"
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
		c := s.begin(base, info.FullMethod)
		c.log.V(4).Info("Call", "content", redacted{req})
		var reply any
		err := c.end(guard(c.log, func() (err error) {
			if err := s.standby(info.FullMethod); err != nil {
				return err
			}
			reply, err = handler(klog.NewContext(ctx, c.log), req)
			return err
		}))
		if err != nil {
			return nil, err
		}
		c.log.V(4).Info("Reply", "content", redacted{reply})
		return reply, nil
	}
}

// interceptStream does the same for calls that are answered by a stream.
func (s *Server) interceptStream(base klog.Logger) grpc.StreamServerInterceptor {
	return func(service any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		c := s.begin(base, info.FullMethod)
		return c.end(guard(c.log, func() error {
			if err := s.standby(info.FullMethod); err != nil {
				return err
			}
			return handler(service, loggedStream{stream, klog.NewContext(stream.Context(), c.log), c.log})
		}))
	}
}

// standby refuses all but Identity where another process works.
func (s *Server) standby(method string) error {
	if strings.HasPrefix(method, "/csi.v1.Identity/") {
		return nil
	}
	if why := s.cfg.Standby(); why != nil {
		return fault.New(fault.Unavailable, "%w", why)
	}
	return nil
}

// loggedStream has the call's logger in its context.
type loggedStream struct {
	grpc.ServerStream
	ctx context.Context
	log klog.Logger
}

// Context implements grpc.ServerStream.
func (l loggedStream) Context() context.Context { return l.ctx }

// RecvMsg implements grpc.ServerStream: the request comes through here.
func (l loggedStream) RecvMsg(m any) error {
	err := l.ServerStream.RecvMsg(m)
	if err == nil {
		l.log.V(4).Info("Call", "content", redacted{m})
	}
	return err
}

// SendMsg implements grpc.ServerStream.
func (l loggedStream) SendMsg(m any) error {
	l.log.V(5).Info("Part of the reply", "content", redacted{m})
	return l.ServerStream.SendMsg(m)
}

// call is one that is being answered.
type call struct {
	s      *Server
	method string
	log    klog.Logger
	began  time.Time
}

func (s *Server) begin(base klog.Logger, method string) *call {
	method = path.Base(method)
	return &call{s: s, method: method, log: klog.LoggerWithValues(base, "method", method, "request", requestID()), began: time.Now()}
}

// end counts and logs a call, and translates its error.
func (c *call) end(err error) error {
	took := time.Since(c.began)
	code := rpcfault.CodeName(err)
	if c.s.calls != nil {
		c.s.calls.WithLabelValues(c.method, code).Observe(took.Seconds())
	}
	switch {
	case err == nil:
		c.log.V(2).Info("Call done", "took", took)
	case fault.KindOf(err) == fault.Internal || fault.KindOf(err) == fault.Corrupt:
		c.log.Error(err, "Call failed", "code", code, "took", took)
	default:
		c.log.Info("Call refused", "code", code, "reason", err.Error(), "took", took)
	}
	return rpcfault.ToCSI(err)
}

// guard turns a panic into an error: a bug in one call must not end the calls
// of other volumes.
func guard(log klog.Logger, do func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fault.New(fault.Internal, "a bug in Quarry: %v (the log has its place)", p)
			log.Error(err, "Panic", "stack", string(debug.Stack()))
		}
	}()
	return do()
}

func requestID() string {
	var b [6]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	return hex.EncodeToString(b[:])
}

package csi

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// waiting is a server that does not work until work is called.
func waiting(t *testing.T) (s *Server, work func()) {
	t.Helper()
	s, _, _ = world(t)
	cfg, settled := s.cfg, make(chan struct{})
	var works atomic.Bool
	cfg.Settled = settled
	cfg.Standby = func() error {
		if works.Load() {
			return nil
		}
		return errors.New("another one leads")
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s, func() { works.Store(true); close(settled) }
}

func TestAProbeOfOneThatWaitsIsAnsweredInTime(t *testing.T) {
	s, _ := waiting(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	r, err := s.Probe(ctx, &csi.ProbeRequest{})
	if err != nil || ctx.Err() != nil || r.GetReady().GetValue() {
		t.Fatalf("%v, %v, %v", r, err, ctx.Err())
	}
}

func TestAProbeEndsWhenTheProcessWorks(t *testing.T) {
	s, work := waiting(t)
	ready := make(chan bool, 1)
	go func() {
		r, err := s.Probe(t.Context(), &csi.ProbeRequest{})
		ready <- err == nil && r.GetReady().GetValue()
	}()
	work()
	if !<-ready {
		t.Fatal("it is not ready")
	}
}

package rig

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"testing"
)

// Tested lets a program use what was written for tests, such as the servers of
// test/lab. What fails there ends f, as it ends a test, and is returned; what was
// to be cleaned up then is, the last first. t belongs to f's goroutine.
func Tested(ctx context.Context, f func(t testing.TB) error) error {
	t := &tb{ctx: ctx}
	t.apart(func() {
		if err := f(t); err != nil {
			t.failures = append(t.failures, err)
		}
	})
	for len(t.cleanups) > 0 {
		last := len(t.cleanups) - 1
		do := t.cleanups[last]
		t.cleanups = t.cleanups[:last]
		t.apart(do)
	}
	return errors.Join(t.failures...)
}

type tb struct {
	testing.TB // nil: for its method that nobody else can have

	ctx      context.Context
	failures []error
	cleanups []func()
}

// apart runs f in a goroutine of its own, which FailNow can end.
func (t *tb) apart(f func()) {
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		f()
	}()
	<-ended
}

func (t *tb) Helper()                  {}
func (t *tb) Name() string             { return "bench" }
func (t *tb) Context() context.Context { return t.ctx }
func (t *tb) Failed() bool             { return len(t.failures) > 0 }
func (t *tb) FailNow()                 { runtime.Goexit() }
func (t *tb) Cleanup(f func())         { t.cleanups = append(t.cleanups, f) }

func (t *tb) Log(args ...any)                 { fmt.Fprintln(os.Stderr, args...) }
func (t *tb) Logf(format string, args ...any) { t.Log(fmt.Sprintf(format, args...)) }

func (t *tb) Error(args ...any) { t.failures = append(t.failures, errors.New(fmt.Sprint(args...))) }
func (t *tb) Errorf(format string, args ...any) {
	t.failures = append(t.failures, fmt.Errorf(format, args...))
}

func (t *tb) Fatal(args ...any) {
	t.Error(args...)
	t.FailNow()
}

func (t *tb) Fatalf(format string, args ...any) {
	t.Errorf(format, args...)
	t.FailNow()
}

// Skip fails: a benchmark that cannot run has measured nothing.
func (t *tb) Skip(args ...any)                 { t.Fatal(args...) }
func (t *tb) Skipf(format string, args ...any) { t.Fatalf(format, args...) }

func (t *tb) TempDir() string {
	dir, err := os.MkdirTemp("", "bench-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

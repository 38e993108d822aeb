package process

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// idle is a Quarry whose binary is a script.
func idle(t *testing.T, script string) *Quarry {
	t.Helper()
	dir := t.TempDir()
	binary := filepath.Join(dir, "quarry")
	if err := os.WriteFile(binary, []byte("#!/bin/sh\n"+script+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	q, err := New(Config{Binary: binary, Dir: dir, Domains: DomainsFile(Domain("d", "/d", "  scope: node\n")), Node: "n"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := q.Close(); err != nil {
			t.Error(err)
		}
	})
	return q
}

func TestAStartThatFailsSaysWhatQuarrySaid(t *testing.T) {
	q := idle(t, "echo 'no such domain'; exit 3")
	err := q.Start(t.Context())
	if err == nil || !strings.Contains(err.Error(), "exit status 3") || !strings.Contains(err.Error(), "no such domain") || q.Running() {
		t.Errorf("running %v, %v", q.Running(), err)
	}
	if text, err := os.ReadFile(filepath.Join(q.Dir, "domains.yaml")); err != nil ||
		string(text) != "domains:\n- name: d\n  engine: dir\n  params:\n    path: /d\n  scope: node\n" {
		t.Errorf("domains file %q, %v", text, err)
	}
	if err := errors.Join(q.Stop(t.Context()), q.Kill()); err != nil {
		t.Errorf("ending what does not run: %v", err)
	}
}

func TestAStartThatHangsIsEnded(t *testing.T) {
	q := idle(t, "touch \"${0%quarry}began\"; exec sleep 1000")
	ctx, cancel := context.WithCancel(t.Context())
	started := make(chan error, 1)
	go func() { started <- q.Start(ctx) }()
	for _, err := os.Stat(filepath.Join(q.Dir, "began")); err != nil; _, err = os.Stat(filepath.Join(q.Dir, "began")) {
		select {
		case err := <-started:
			t.Fatalf("ended at once: %v", err)
		case <-time.After(time.Millisecond):
		}
	}
	cancel()
	if err := <-started; !errors.Is(err, context.Canceled) || q.Running() {
		t.Errorf("running %v, %v", q.Running(), err)
	}
	select {
	case <-q.exited:
	default:
		t.Error("the process is left behind")
	}
}

package fault_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"testing"

	"github.com/quarry-csi/quarry/pkg/fault"
)

func TestTheKindIsFoundThroughEveryWrapping(t *testing.T) {
	base := fault.New(fault.Exhausted, "volume %q: %w", "v", io.ErrShortWrite)
	for name, err := range map[string]error{
		"as made":      base,
		"wrapped":      fmt.Errorf("outer: %w", base),
		"with context": fault.In(base, "create volume", "nas", "v"),
		"joined":       errors.Join(errors.New("other"), base),
	} {
		if !errors.Is(err, fault.Exhausted) || errors.Is(err, fault.NotFound) || fault.KindOf(err) != fault.Exhausted {
			t.Errorf("%s: kind %s", name, fault.KindOf(err))
		}
		if !errors.Is(err, io.ErrShortWrite) {
			t.Errorf("%s: the cause is lost", name)
		}
	}
}

func TestTheOutermostKindCounts(t *testing.T) {
	err := fault.New(fault.Unavailable, "cleaning up failed: %w", fault.New(fault.Exhausted, "full"))
	if fault.KindOf(err) != fault.Unavailable {
		t.Errorf("kind %s", fault.KindOf(err))
	}
}

func TestErrorsWithoutAKind(t *testing.T) {
	for want, err := range map[fault.Kind]error{
		fault.Canceled: fmt.Errorf("x: %w", context.Canceled),
		fault.Deadline: context.DeadlineExceeded,
		fault.Internal: io.EOF,
		fault.NotFound: fmt.Errorf("x: %w", fault.NotFound),
	} {
		if got := fault.KindOf(err); got != want {
			t.Errorf("%v: %s, want %s", err, got, want)
		}
	}
}

func TestInSaysWhereAndNothingTwice(t *testing.T) {
	err := fault.In(fault.In(fault.New(fault.Invalid, "size 0"), "create volume", "nas", "v"), "other", "lvm", "w")
	if got, want := err.Error(), "create volume v in domain nas: size 0"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if fault.In(nil, "op", "d", "o") != nil || fault.Wrap(fault.Invalid, nil) != nil {
		t.Error("nil became an error")
	}
	if got := (&fault.Error{Kind: fault.Pending}).Error(); got != "pending" {
		t.Errorf("without a cause: %q", got)
	}
}

func TestEveryKindHasAName(t *testing.T) {
	seen := map[string]bool{}
	for k := fault.Internal; k <= fault.Deadline; k++ {
		if seen[k.String()] || k.String() == "" {
			t.Errorf("kind %d: name %q", k, k)
		}
		seen[k.Error()] = true
	}
	if fault.Kind(200).String() != "kind 200" {
		t.Error(fault.Kind(200).String())
	}
}

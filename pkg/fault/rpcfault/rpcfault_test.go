package rpcfault

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/quarry-csi/quarry/pkg/fault"
)

func TestEveryKindSurvivesTheJourney(t *testing.T) {
	seen := 0
	for k := fault.Internal; k <= fault.Deadline; k++ {
		seen++
		in := fault.In(fault.New(k, "the cause"), "create volume", "nas", "v-1")
		wire := ToStatus(in)
		s, ok := status.FromError(wire)
		if !ok {
			t.Fatalf("%s: ToStatus gave no status: %v", k, wire)
		}
		out := FromStatus(s.Err())
		if !errors.Is(out, k) || fault.KindOf(out) != k {
			t.Errorf("%s came back as %s", k, fault.KindOf(out))
		}
		var f *fault.Error
		if !errors.As(out, &f) || f.Op != "create volume" || f.Domain != "nas" || f.Object != "v-1" || out.Error() != in.Error() {
			t.Errorf("%s: context lost: %#v, text %q, want %q", k, f, out, in)
		}
	}
	if seen != len(table) {
		t.Errorf("the table has %d rows for %d kinds", len(table), seen)
	}
}

func TestCSIStatusHasNoDetails(t *testing.T) {
	for _, row := range table {
		s, _ := status.FromError(ToCSI(fault.New(row.kind, "x")))
		if s.Code() != row.code || s.Message() != "x" || len(s.Details()) != 0 {
			t.Errorf("%s: got %s %q with %d details", row.kind, s.Code(), s.Message(), len(s.Details()))
		}
	}
}

func TestWhatSidecarsTakeForStillRunning(t *testing.T) {
	for kind, want := range map[fault.Kind]codes.Code{
		fault.Pending: codes.Aborted, fault.Conflict: codes.Aborted, fault.Unavailable: codes.Unavailable,
		fault.Canceled: codes.Canceled, fault.Deadline: codes.DeadlineExceeded,
	} {
		if got := status.Code(ToCSI(fault.New(kind, "x"))); got != want {
			t.Errorf("%s is sent as %s, want %s", kind, got, want)
		}
	}
}

func TestErrorsOfOthers(t *testing.T) {
	for _, c := range []struct {
		name string
		err  error
		want codes.Code
	}{
		{"plain error", errors.New("boom"), codes.Internal},
		{"bare kind", fault.NotFound, codes.NotFound},
		{"wrapped fault", fmt.Errorf("outer: %w", fault.New(fault.InUse, "x")), codes.FailedPrecondition},
		{"context canceled", fmt.Errorf("outer: %w", context.Canceled), codes.Canceled},
		{"context deadline", context.DeadlineExceeded, codes.DeadlineExceeded},
		{"a status keeps its code", status.Error(codes.Unauthenticated, "x"), codes.Unauthenticated},
		{"a fault that wraps a status wins", fault.Wrap(fault.Unavailable, status.Error(codes.NotFound, "x")), codes.Unavailable},
	} {
		if got := status.Code(ToCSI(c.err)); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
	if ToCSI(nil) != nil || ToStatus(nil) != nil || FromStatus(nil) != nil {
		t.Error("nil must stay nil")
	}
}

func TestStatusOfAStranger(t *testing.T) {
	for _, row := range table {
		want := row.code
		if want == codes.ResourceExhausted {
			want = codes.Unavailable // it may be gRPC's own limit, after the work was done
		}
		if got := fault.KindOf(FromStatus(status.Error(row.code, "x"))); codeOf(got) != want {
			t.Errorf("%s was read as %s", row.code, got)
		}
	}
	if full := FromStatus(ToStatus(fault.New(fault.Exhausted, "full"))); !errors.Is(full, fault.Exhausted) {
		t.Errorf("a full storage was read as %v", full)
	}
	if !errors.Is(FromStatus(status.Error(codes.Canceled, "x")), context.Canceled) {
		t.Error("a peer's cancellation is not found by errors.Is")
	}
	plain := errors.New("no status")
	if FromStatus(plain) != plain {
		t.Error("an error that is no status was changed")
	}
	// A peer that claims a kind which does not belong to its code is not believed.
	forged := ToStatus(fault.New(fault.Pending, "x"))
	s, _ := status.FromError(forged)
	p := s.Proto()
	p.Code = int32(codes.NotFound)
	if got := fault.KindOf(FromStatus(status.FromProto(p).Err())); got != fault.NotFound {
		t.Errorf("kind %s believed against its code", got)
	}
}

func TestCodeNames(t *testing.T) {
	if CodeName(nil) != "OK" || CodeName(fault.New(fault.NotFound, "x")) != "NOT_FOUND" {
		t.Error("wrong names")
	}
}

// TestAFullStorageIsToldFromALimitOfGRPC: by a detail that needs none of our own numbers.
func TestAFullStorageIsToldFromALimitOfGRPC(t *testing.T) {
	bare := status.New(codes.ResourceExhausted, "full")
	for domain, want := range map[string]fault.Kind{ErrorDomain: fault.Exhausted, "example.com": fault.Unavailable} {
		s, err := bare.WithDetails(&errdetails.ErrorInfo{Reason: "FULL", Domain: domain})
		if err != nil {
			t.Fatal(err)
		}
		if out := FromStatus(s.Err()); fault.KindOf(out) != want || out.Error() != "full" {
			t.Errorf("with a detail of %s: %v (%v), want %v", domain, out, fault.KindOf(out), want)
		}
	}
	if out := FromStatus(bare.Err()); fault.KindOf(out) != fault.Unavailable {
		t.Errorf("without a detail: %v", fault.KindOf(out))
	}
}

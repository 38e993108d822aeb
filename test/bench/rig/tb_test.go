package rig

import (
	"context"
	"errors"
	"os"
	"slices"
	"testing"
)

func TestWhatFailsInATestedFunctionEndsItAndIsCleanedUp(t *testing.T) {
	var seen []string
	var dir string
	err := Tested(context.Background(), func(tb testing.TB) error {
		dir = tb.TempDir()
		tb.Cleanup(func() { seen = append(seen, "first") })
		tb.Cleanup(func() {
			seen = append(seen, "second")
			tb.Fatal("a cleanup")
			seen = append(seen, "after a failure")
		})
		tb.Fatalf("no %s", "server")
		seen = append(seen, "after a failure")
		return nil
	})
	if err == nil || err.Error() != "no server\na cleanup" {
		t.Errorf("the error is %v", err)
	}
	if want := []string{"second", "first"}; !slices.Equal(seen, want) {
		t.Errorf("%v happened, not %v", seen, want)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its folder is still there: %v", err)
	}
}

func TestATestedFunctionReturnsItsError(t *testing.T) {
	failure := errors.New("failure")
	cleaned := false
	err := Tested(context.Background(), func(tb testing.TB) error {
		tb.Cleanup(func() { cleaned = tb.Failed() })
		return failure
	})
	if !errors.Is(err, failure) || !cleaned {
		t.Errorf("it returned %v; a cleanup saw the failure: %t", err, cleaned)
	}
	if err := Tested(context.Background(), func(testing.TB) error { return nil }); err != nil {
		t.Errorf("without a failure it returned %v", err)
	}
}

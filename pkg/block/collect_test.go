package block

import (
	"context"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/quarry-csi/quarry/pkg/host"
)

// leftOver is a kernel with a device that is suspended, and loop devices that nobody uses. Those of one
// domain's storage cannot be detached before it answers.
type leftOver struct {
	kernel
	dead    string
	answers chan struct{}

	mu    sync.Mutex
	loops []host.Loop
}

func (k *leftOver) DeviceMapper(context.Context) error { return nil }

func (k *leftOver) Mapped(context.Context, string) ([]host.Mapped, error) { return nil, nil }

func (k *leftOver) ResumeLeft(context.Context, string) ([]host.Mapped, error) {
	return []host.Mapped{{Name: "left"}}, nil
}

func (k *leftOver) Loops(_ context.Context, match func(host.Loop) bool) ([]host.Loop, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(k.loops), func(lp host.Loop) bool { return !match(lp) }), nil
}

func (k *leftOver) DetachLoop(_ context.Context, lp host.Loop) error {
	if domainOf(lp.Mark) == domainHash(k.dead) {
		<-k.answers
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.loops = slices.DeleteFunc(k.loops, func(o host.Loop) bool { return o == lp })
	return nil
}

func TestADeadStorageHoldsUpNoOthersTidying(t *testing.T) {
	domains := []string{"a", "b", "c"}
	slices.SortFunc(domains, func(a, b string) int { return strings.Compare(domainHash(a), domainHash(b)) })
	k := &leftOver{dead: domains[0], answers: make(chan struct{})}
	for i, name := range domains {
		k.loops = append(k.loops, host.Loop{Number: i, Mark: slabMark(name + "/s")})
	}
	left := func() int {
		k.mu.Lock()
		defer k.mu.Unlock()
		return len(k.loops)
	}
	d := &Devices{kernel: k}
	if resumed, err := d.Resume(t.Context()); err != nil || !slices.Equal(resumed, []string{"left"}) || left() != 3 {
		t.Errorf("resumed %q, %v; of 3 loop devices there are %d", resumed, err, left())
	}
	done := make(chan error)
	go func() { done <- d.CollectAll(context.Background()) }()
	for end := time.Now().Add(time.Minute); left() > 1; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d loop devices are left", left())
		}
	}
	close(k.answers)
	if err := <-done; err != nil || left() != 0 {
		t.Errorf("%v, %d loop devices are left", err, left())
	}
}

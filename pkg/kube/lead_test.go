package kube_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/kube"
)

var leases = schema.GroupResource{Group: "coordination.k8s.io", Resource: "leases"}

// steady is a Lease that no test waits long enough to lose.
func steady(identity string) kube.LeaseConfig {
	return kube.LeaseConfig{
		Namespace: "quarry", Name: "csi-quarry-dev", Identity: identity,
		LeaseDuration: 4 * time.Minute, RenewDeadline: 2 * time.Minute, RetryPeriod: 10 * time.Millisecond,
	}
}

// fragile is one that is lost soon when it is not renewed.
func fragile(identity string) kube.LeaseConfig {
	c := steady(identity)
	c.LeaseDuration, c.RenewDeadline = 3*time.Second, 2*time.Second // a busy machine must not lose it by itself
	return c
}

// candidate is a process that wants to lead.
type candidate struct {
	leading chan context.Context // that of lead, once it leads
	finish  chan error           // what lead is to return
	ended   chan error           // what Lead has returned
	cancel  context.CancelFunc

	mu      sync.Mutex
	leaders []string // as it saw them
}

// run begins a candidate's life. Its lead returns when finish has something.
func run(t *testing.T, api *fake.Clientset, cfg kube.LeaseConfig) *candidate {
	t.Helper()
	ctx, _ := logged(t)
	ctx, cancel := context.WithCancel(ctx)
	c := &candidate{leading: make(chan context.Context, 1), finish: make(chan error, 1), ended: make(chan error, 1), cancel: cancel}
	cfg.Leader = func(identity string) {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.leaders = append(c.leaders, identity)
	}
	go func() {
		c.ended <- kube.Lead(ctx, kube.New(api), cfg, func(ctx context.Context) error {
			c.leading <- ctx
			return <-c.finish
		})
	}()
	t.Cleanup(cancel)
	return c
}

func (c *candidate) saw() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.leaders)
}

// lease as it is now.
func lease(t *testing.T, api *fake.Clientset) *coordinationv1.Lease {
	t.Helper()
	l, err := api.CoordinationV1().Leases("quarry").Get(t.Context(), "csi-quarry-dev", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func holder(t *testing.T, api *fake.Clientset) string {
	t.Helper()
	return *lease(t, api).Spec.HolderIdentity
}

// until waits for a condition.
func until(t *testing.T, what string, met func() bool) {
	t.Helper()
	end := time.After(patience)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !met() {
		select {
		case <-tick.C:
		case <-end:
			t.Fatal("waited in vain until " + what)
		}
	}
}

// within takes what a channel gives.
func within[T any](t *testing.T, what string, from <-chan T) T {
	t.Helper()
	select {
	case v := <-from:
		return v
	case <-time.After(patience):
		t.Fatal("waited in vain for " + what)
		panic("not reached")
	}
}

// onUpdate is asked about each update of the Lease: an error refuses it.
func onUpdate(api *fake.Clientset, ask func(*coordinationv1.Lease) error) {
	api.PrependReactor("update", "leases", func(a k8stesting.Action) (bool, runtime.Object, error) {
		err := ask(a.(k8stesting.UpdateAction).GetObject().(*coordinationv1.Lease))
		return err != nil, nil, err
	})
}

func TestTheSecondLeadsWhenTheFirstHasEndedAndNotBefore(t *testing.T) {
	api := fake.NewClientset()
	first := run(t, api, steady("first"))
	leading := within(t, "the first to lead", first.leading)
	second := run(t, api, steady("second"))
	until(t, "the second knows who leads", func() bool { return slices.Equal(second.saw(), []string{"first"}) })

	// The first is told to end, and takes its time: until it has ended, the Lease is
	// renewed and nobody else leads.
	first.cancel()
	within(t, "the end of the first's context", leading.Done())
	for range 3 {
		renewed := lease(t, api).Spec.RenewTime.Time
		until(t, "the Lease is renewed", func() bool { return lease(t, api).Spec.RenewTime.After(renewed) })
	}
	if h := holder(t, api); h != "first" {
		t.Fatalf("%q holds the Lease while the first still ends", h)
	}
	if len(second.leading) > 0 || len(first.ended) > 0 {
		t.Fatal("the second leads, or the first is said to have ended, while its lead runs")
	}

	bye := errors.New("bye")
	first.finish <- bye
	if err := within(t, "the first's end", first.ended); err != bye {
		t.Fatalf("Lead returned %v", err)
	}
	leading = within(t, "the second to lead", second.leading)
	if h := holder(t, api); h != "second" || leading.Err() != nil {
		t.Fatalf("%q holds the Lease; %v", h, leading.Err())
	}
	if n := *lease(t, api).Spec.LeaseTransitions; n != 1 {
		t.Errorf("%d transitions", n)
	}
	if saw := first.saw(); !slices.Equal(saw, []string{"first", ""}) {
		t.Errorf("the first saw %q lead", saw)
	}
	second.cancel()
	second.finish <- nil
	if err := within(t, "the second's end", second.ended); err != nil {
		t.Fatal(err)
	}
	if saw := second.saw(); saw[len(saw)-1] != "" || !slices.Contains(saw, "second") {
		t.Errorf("the second saw %q lead", saw)
	}
}

func TestALeadThatEndsByItselfGivesTheLeaseBack(t *testing.T) {
	api := fake.NewClientset()
	c := run(t, api, steady("only"))
	within(t, "it to lead", c.leading)
	broken := fault.New(fault.Corrupt, "broken")
	c.finish <- broken
	if err := within(t, "its end", c.ended); err != error(broken) {
		t.Fatalf("Lead returned %v", err)
	}
	if h := holder(t, api); h != "" {
		t.Fatalf("%q holds the Lease", h)
	}
}

func TestALeaseThatCannotBeRenewedIsLost(t *testing.T) {
	t.Parallel()
	api := fake.NewClientset()
	var down atomic.Bool
	onUpdate(api, func(l *coordinationv1.Lease) error {
		if *l.Spec.HolderIdentity == "" {
			t.Error("the lost Lease is given back")
		}
		if down.Load() {
			return apierrors.NewServiceUnavailable("restarting")
		}
		return nil
	})
	c := run(t, api, fragile("only"))
	leading := within(t, "it to lead", c.leading)
	down.Store(true)
	within(t, "the end of lead's context", leading.Done())
	if len(c.ended) > 0 {
		t.Fatal("Lead has not waited for lead")
	}
	down.Store(false)
	c.finish <- errors.New("half done")
	err := within(t, "its end", c.ended)
	expect(t, err, fault.Unavailable, "lease quarry/csi-quarry-dev is lost", "this process ends", "half done")
	if fault.KindOf(err) != fault.Unavailable {
		t.Fatal(fault.KindOf(err))
	}
}

// A request that never returns keeps the elector from seeing that its time is over.
func TestALeaseIsLostEvenIfTheAPIHangs(t *testing.T) {
	t.Parallel()
	api := fake.NewClientset()
	hang, hangs := make(chan struct{}), make(chan struct{})
	var leads atomic.Bool
	onUpdate(api, func(*coordinationv1.Lease) error {
		if leads.CompareAndSwap(true, false) {
			close(hangs)
			<-hang
		}
		return nil
	})
	c := run(t, api, fragile("only"))
	leading := within(t, "it to lead", c.leading)
	leads.Store(true)
	within(t, "a request that hangs", hangs)
	within(t, "the end of lead's context", leading.Done())
	close(hang)
	c.finish <- leading.Err()
	err := within(t, "its end", c.ended)
	expect(t, err, fault.Unavailable, "is lost")
	if strings.Contains(err.Error(), "canceled") {
		t.Errorf("a cause that is none: %v", err)
	}
}

func TestALeaseThatAnotherTookIsLostAndStaysTheirs(t *testing.T) {
	t.Parallel()
	api := fake.NewClientset()
	var taken atomic.Bool
	onUpdate(api, func(*coordinationv1.Lease) error {
		if taken.Load() {
			return apierrors.NewConflict(leases, "csi-quarry-dev", errors.New("the object has been modified"))
		}
		return nil
	})
	c := run(t, api, fragile("first"))
	leading := within(t, "it to lead", c.leading)
	other, seconds := "other", int32(3600)
	theirs := lease(t, api)
	theirs.Spec.HolderIdentity, theirs.Spec.LeaseDurationSeconds = &other, &seconds
	taken.Store(true)
	if err := api.Tracker().Update(coordinationv1.SchemeGroupVersion.WithResource("leases"), theirs, "quarry"); err != nil {
		t.Fatal(err)
	}
	within(t, "the end of lead's context", leading.Done())
	taken.Store(false)
	c.finish <- nil
	expect(t, within(t, "its end", c.ended), fault.Unavailable, "is lost")
	if h := holder(t, api); h != "other" {
		t.Fatalf("%q holds the Lease", h)
	}
	if saw := c.saw(); !slices.Equal(saw, []string{"first", "other"}) {
		t.Errorf("it saw %q lead", saw)
	}
}

func TestWhoEndsWhileWaitingHasTouchedNothing(t *testing.T) {
	api := fake.NewClientset()
	first := run(t, api, steady("first"))
	within(t, "the first to lead", first.leading)
	second := run(t, api, steady("second"))
	until(t, "the second knows who leads", func() bool { return len(second.saw()) > 0 })
	second.cancel()
	if err := within(t, "the second's end", second.ended); err != nil {
		t.Fatal(err)
	}
	if len(second.leading) > 0 {
		t.Fatal("the second has led")
	}
	if h := holder(t, api); h != "first" {
		t.Fatalf("%q holds the Lease", h)
	}
	first.finish <- nil
	within(t, "the first's end", first.ended)
}

func TestALeaseTakenInTheLastMomentIsGivenBack(t *testing.T) {
	api := fake.NewClientset()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	api.PrependReactor("create", "leases", func(k8stesting.Action) (bool, runtime.Object, error) {
		cancel()
		return false, nil, nil // and it is made
	})
	err := kube.Lead(ctx, kube.New(api), steady("late"), func(context.Context) error {
		t.Error("lead has run")
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if h := holder(t, api); h != "" {
		t.Fatalf("%q holds the Lease", h)
	}
}

func TestALeaseThatAnotherTookInTheLastMomentIsNotGivenBack(t *testing.T) {
	api := fake.NewClientset()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	other := "other"
	api.PrependReactor("create", "leases", func(k8stesting.Action) (bool, runtime.Object, error) {
		cancel()
		theirs := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: "quarry", Name: "csi-quarry-dev"}, Spec: coordinationv1.LeaseSpec{HolderIdentity: &other}}
		return true, nil, errors.Join(apierrors.NewAlreadyExists(leases, theirs.Name), api.Tracker().Add(theirs))
	})
	if err := kube.Lead(ctx, kube.New(api), steady("late"), func(context.Context) error { return errors.New("has led") }); err != nil {
		t.Fatal(err)
	}
	if h := holder(t, api); h != other {
		t.Fatalf("%q holds the Lease", h)
	}
}

func TestGivingBackIsTriedAgainAfterAConflict(t *testing.T) {
	api := fake.NewClientset()
	var conflicts atomic.Int32
	onUpdate(api, func(l *coordinationv1.Lease) error {
		if *l.Spec.HolderIdentity == "" && conflicts.Add(1) == 1 {
			return apierrors.NewConflict(leases, "csi-quarry-dev", errors.New("the object has been modified"))
		}
		return nil
	})
	c := run(t, api, steady("only"))
	within(t, "it to lead", c.leading)
	c.finish <- nil
	if err := within(t, "its end", c.ended); err != nil {
		t.Fatal(err)
	}
	if h := holder(t, api); h != "" || conflicts.Load() != 2 {
		t.Fatalf("%q holds the Lease after %d attempts", h, conflicts.Load())
	}
}

func TestALeaseThatCannotBeGivenBackIsLoggedAndNoError(t *testing.T) {
	api := fake.NewClientset()
	onUpdate(api, func(l *coordinationv1.Lease) error {
		if *l.Spec.HolderIdentity == "" {
			return apierrors.NewForbidden(leases, "csi-quarry-dev", errors.New("no"))
		}
		return nil
	})
	ctx, logs := logged(t)
	if err := kube.Lead(ctx, kube.New(api), steady("only"), func(context.Context) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(logs(), "could not be given back") {
		t.Fatal(logs())
	}
}

func TestALeaseConfigThatCannotWorkIsRefused(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*kube.LeaseConfig)
		field  string
	}{
		"no namespace":        {func(c *kube.LeaseConfig) { c.Namespace = "" }, "Namespace:"},
		"no name":             {func(c *kube.LeaseConfig) { c.Name = "" }, "Name:"},
		"no identity":         {func(c *kube.LeaseConfig) { c.Identity = "" }, "Identity:"},
		"no retry":            {func(c *kube.LeaseConfig) { c.RetryPeriod = 0 }, "RetryPeriod 0s:"},
		"negative":            {func(c *kube.LeaseConfig) { c.RetryPeriod = -1 }, "RetryPeriod -1ns:"},
		"renewal is no retry": {func(c *kube.LeaseConfig) { c.RenewDeadline = 12 * time.Millisecond }, "RenewDeadline 12ms:"},
		"lease is no renewal": {func(c *kube.LeaseConfig) { c.LeaseDuration = c.RenewDeadline }, "LeaseDuration 2m0s:"},
		"two could lead":      {func(c *kube.LeaseConfig) { c.LeaseDuration = c.RenewDeadline + c.RetryPeriod }, "LeaseDuration 2m0.01s:"},
		"parts of seconds":    {func(c *kube.LeaseConfig) { c.LeaseDuration += time.Millisecond }, "LeaseDuration 4m0.001s:"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := steady("only")
			c.change(&cfg)
			err := kube.Lead(t.Context(), kube.New(fake.NewClientset()), cfg, func(context.Context) error { return errors.New("has led") })
			expect(t, err, fault.Invalid, c.field)
		})
	}
}

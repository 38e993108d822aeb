package e2e

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/watch"
)

// podsAtOnce use the claims of a storm, each of which is started and deleted twice. A node takes 110 pods.
const podsAtOnce = 10

// TestAStormOfClaims: many claims at once on Quarry, and on a driver that does nothing, one after the other, while pods
// that use them come and go. It says how many were bound in a minute, and how long one took; $QUARRY_STORM says how
// many there are.
func TestAStormOfClaims(t *testing.T) {
	many := 20
	if s := os.Getenv("QUARRY_STORM"); s != "" {
		var err error
		if many, err = strconv.Atoi(s); err != nil || many < 1 {
			t.Fatalf("$QUARRY_STORM %q must be a number of claims", s)
		}
	}
	r := newRig(t)
	floor := r.serveEmpty()
	rates := map[string]float64{}
	rounds := []string{classShared, floor, floor, classShared}
	if many >= 100 {
		rounds = rounds[:2] // long enough by itself
	}
	for round, class := range rounds {
		took, all, pods := r.storm(fmt.Sprintf("storm%d", round), class, many)
		slices.Sort(took)
		rate := float64(many) / all.Minutes()
		rates[class] += rate / float64(len(rounds)/2)
		r.Logf("%-12.12s %d claims: %.0f a minute, p50 %s, p99 %s, beside %d starts of pods", class, many, rate,
			took[many/2].Round(time.Millisecond), took[min(many-1, many*99/100)].Round(time.Millisecond), pods)
	}
	r.Logf("Quarry binds %.2f times as many claims as the floor", rates[classShared]/rates[floor])
}

// storm makes claims and pods that use them, waits until all are bound, and deletes them. It says how long each took from
// its creation until it was seen to be bound, all together, and how many times a pod was started.
func (r *rig) storm(prefix, class string, many int) (took []time.Duration, all time.Duration, pods int64) {
	r.Helper()
	claims := r.kube.CoreV1().PersistentVolumeClaims(r.ns)
	ctx, cancel := context.WithTimeout(bg, 4*patience)
	defer cancel()
	seen := must(claims.Watch(ctx, metav1.ListOptions{FieldSelector: fields.Everything().String()}))(r)
	defer seen.Stop()
	var mu sync.Mutex
	created := map[string]time.Time{}
	began := time.Now()
	names, ready := make(chan string, many), make(chan string, many)
	for i := range many {
		names <- fmt.Sprintf("%s-%d", prefix, i)
	}
	close(names)
	var makers, users sync.WaitGroup
	errs := make(chan error, 2*many)
	for range 8 {
		makers.Go(func() {
			for name := range names {
				mu.Lock()
				created[name] = time.Now()
				mu.Unlock()
				_, err := claims.Create(ctx, &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Name: name},
					Spec: claim{class: class, size: "16Mi"}.spec()}, metav1.CreateOptions{})
				if err != nil {
					errs <- err
				}
			}
		})
	}
	var started atomic.Int64
	over, end := context.WithCancel(ctx)
	defer end()
	for range podsAtOnce {
		users.Go(func() {
			for name := range ready {
				if err := r.use(over, name, &started); err != nil {
					errs <- err
				}
				if over.Err() != nil {
					return
				}
			}
		})
	}
	bound := map[string]bool{}
	for len(bound) < many {
		select {
		case err := <-errs:
			r.Fatal(err)
		case e, ok := <-seen.ResultChan():
			if !ok {
				r.Fatalf("the watch ended with %d of %d claims bound", len(bound), many)
			}
			c, isClaim := e.Object.(*corev1.PersistentVolumeClaim)
			if !isClaim || e.Type == watch.Deleted || c.Status.Phase != corev1.ClaimBound || bound[c.Name] {
				continue
			}
			mu.Lock()
			at, mine := created[c.Name]
			mu.Unlock()
			if mine {
				bound[c.Name] = true
				took = append(took, time.Since(at))
				ready <- c.Name
			}
		}
	}
	all = time.Since(began)
	pods = started.Load()
	end()
	close(ready)
	makers.Wait()
	users.Wait()
	close(errs)
	for err := range errs {
		r.Error(err)
	}
	if started.Load() == 0 {
		r.Error("no pod used a claim")
	}
	r.must(claims.DeleteCollection(bg, metav1.DeleteOptions{}, metav1.ListOptions{}))
	r.wait("the claims and their volumes to go", func() (bool, error) {
		left, err := r.volumesLeft()
		return err == nil && len(left) == 0, fmt.Errorf("%d volumes are left: %w", len(left), orNever(err))
	})
	return took, all, pods
}

// use starts a pod on a claim, deletes it, and does so again unless the storm is over.
func (r *rig) use(over context.Context, claim string, started *atomic.Int64) error {
	for turn := range 2 {
		name := fmt.Sprintf("%s-pod%d", claim, turn)
		if err := r.tryStart(pod{name: name, claims: []string{claim}}); err != nil {
			return err
		}
		started.Add(1)
		if err := r.tryStop(name); err != nil {
			return err
		}
		if over.Err() != nil {
			break
		}
	}
	return nil
}

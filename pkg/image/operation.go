package image

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// operation is work under way. It runs detached from the call that asked for
// it; later calls for the same key join it.
type operation struct {
	id      string
	key     string
	verb    string
	name    string
	asked   string // fingerprint of the request: a joiner must ask for the same
	started time.Time
	done    chan struct{}

	mu     sync.Mutex // guards the rest until done is closed
	domain string
	image  string
	step   string
	doneB  int64
	totalB int64
	how    how
	result any
	err    error

	teller  *Manager // told of a long copy; nil: nobody
	subject Subject
	told    time.Time
}

// how an image's content came to be.
type how struct {
	native bool
	reason string // "reflink", "copy", ...
}

func (h how) path() string {
	if h.native {
		return "native"
	}
	return "default"
}

func (h how) String() string {
	if h.reason == "" {
		return ""
	}
	return h.path() + ": " + h.reason
}

func (o *operation) at(domain, image string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.domain, o.image = domain, image
}

func (o *operation) stepf(format string, args ...any) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.step, o.doneB, o.totalB = fmt.Sprintf(format, args...), 0, 0
}

func (o *operation) progress(done, total int64) {
	o.mu.Lock()
	o.doneB, o.totalB = done, total
	e := o.news()
	o.mu.Unlock()
	if e != nil {
		o.teller.tell(*e)
	}
}

func (o *operation) took(h how) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.how = h
}

// view is the operation as operators see it.
func (o *operation) view() Operation {
	o.mu.Lock()
	defer o.mu.Unlock()
	v := Operation{ID: o.id, Op: o.verb, Domain: o.domain, Image: o.image, Name: o.name, Step: o.stepText(),
		Done: o.doneB, Total: o.totalB, Started: o.started}
	if o.how.reason != "" {
		v.Path, v.Reason = o.how.path(), o.how.reason
	}
	return v
}

// stepText is what it is doing, and how far it is. The caller holds o.mu.
func (o *operation) stepText() string {
	if o.totalB <= 0 {
		return o.step
	}
	return fmt.Sprintf("%s, %d%% of %s", o.step, o.doneB*100/o.totalB, bytesText(o.totalB))
}

// describe is one line for an error message.
func (o *operation) describe() string {
	v := o.view()
	s := v.Op
	if v.Name != "" {
		s += " " + strconv.Quote(v.Name)
	}
	if v.Step != "" {
		s += ": " + v.Step
	}
	return s
}

// bytesText renders a size for people: "20 GiB", "1.5 MiB".
func bytesText(n int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	f, u := float64(n), 0
	for f >= 1024 && u < len(units)-1 {
		f /= 1024
		u++
	}
	return strconv.FormatFloat(float64(int64(f*10))/10, 'f', -1, 64) + " " + units[u]
}

// operations is the in-flight set.
type operations struct {
	mu      sync.Mutex
	byKey   map[string]*operation
	counter int64
	wg      sync.WaitGroup
	closed  bool
}

// replyMargin is how long before its caller's deadline a call answers that
// the operation is still running.
const replyMargin = 500 * time.Millisecond

// do runs fn detached from ctx under key, or joins the one that runs already,
// and waits for its end. A handle in key may name its domain by a former name.
// fault.Pending: it is still running. fault.Exists: one with another request is
// running under the key.
func do[T any](ctx context.Context, m *Manager, key, verb, name, asked string, fn func(context.Context, *operation) (T, error)) (T, error) {
	var none T
	op, mine, err := m.ops.start(m, m.canonicalKey(key), verb, name, asked)
	if err != nil {
		return none, err
	}
	if op.asked != asked {
		return none, fault.New(fault.Exists, "an operation with other parameters is running under this name: %s", op.describe())
	}
	if mine {
		log := klog.FromContext(ctx)
		go func() {
			defer m.ops.wg.Done()
			res, err := fn(klog.NewContext(m.ctx, log), op)
			m.finish(klog.NewContext(m.ctx, log), op, res, err)
		}()
	}
	if err := op.wait(ctx); err != nil {
		return none, err
	}
	if op.err != nil {
		return none, op.err
	}
	return op.result.(T), nil
}

func (s *operations) start(m *Manager, key, verb, name, asked string) (op *operation, mine bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, false, fault.New(fault.Unavailable, "shutting down")
	}
	if op := s.byKey[key]; op != nil {
		return op, false, nil
	}
	s.counter++
	op = &operation{id: strconv.FormatInt(s.counter, 10), key: key, verb: verb, name: name, asked: asked,
		started: m.cfg.Now(), done: make(chan struct{})}
	s.byKey[key] = op
	s.wg.Add(1)
	return op, true, nil
}

func (m *Manager) finish(ctx context.Context, op *operation, res any, err error) {
	v := op.view()
	took := m.cfg.Now().Sub(op.started)
	op.result, op.err = res, fault.In(err, op.verb, v.Domain, op.name)
	m.ops.mu.Lock()
	delete(m.ops.byKey, op.key)
	m.ops.mu.Unlock()
	close(op.done)
	path := cmp.Or(v.Path, "default")
	if m.cfg.Observe != nil {
		m.cfg.Observe(op.verb, v.Domain, path, took, err)
	}
	log := klog.FromContext(ctx)
	if err != nil && fault.KindOf(err) == fault.Pending { // nothing is wrong, it is going to be tried again
		log.Info("Operation put off", "why", err, "op", op.verb, "name", op.name, "domain", v.Domain, "image", v.Image, "took", took)
		return
	}
	if err != nil {
		log.Error(err, "Operation failed", "op", op.verb, "name", op.name, "domain", v.Domain, "image", v.Image, "took", took)
		return
	}
	log.Info("Operation done", "op", op.verb, "name", op.name, "domain", v.Domain, "image", v.Image, "path", path, "reason", v.Reason, "took", took)
}

// wait waits for the end, but not beyond the caller's patience.
func (o *operation) wait(ctx context.Context) error {
	var early <-chan time.Time
	if deadline, ok := ctx.Deadline(); ok {
		left := time.Until(deadline)
		t := time.NewTimer(left - min(replyMargin, left/4))
		defer t.Stop()
		early = t.C
	}
	select {
	case <-o.done:
		return nil
	case <-early:
	case <-ctx.Done():
	}
	select { // both at once: prefer the result
	case <-o.done:
		return nil
	default:
	}
	return fault.New(fault.Pending, "still running: %s", o.describe())
}

// Operations under way, oldest first.
func (m *Manager) Operations() []Operation {
	m.ops.mu.Lock()
	defer m.ops.mu.Unlock()
	out := make([]Operation, 0, len(m.ops.byKey))
	for _, op := range m.ops.byKey {
		out = append(out, op.view())
	}
	slices.SortFunc(out, func(a, b Operation) int { return a.Started.Compare(b.Started) })
	return out
}

// background runs fn as an operation that nobody waits for. One that runs
// already under the key goes on alone.
func (m *Manager) background(ctx context.Context, key, verb, name string, fn func(context.Context, *operation) error) {
	op, mine, err := m.ops.start(m, key, verb, name, "")
	if err != nil || !mine {
		return
	}
	log := klog.FromContext(ctx)
	go func() {
		defer m.ops.wg.Done()
		ctx := klog.NewContext(m.ctx, log)
		m.finish(ctx, op, struct{}{}, fn(ctx, op))
	}()
}

package host

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// Suspension is a set of suspended devices and the child that watches over it.
type Suspension struct {
	local   *Local
	devices []Mapped // in the order to resume in
	dog     *resumer
	ended   chan struct{} // closed when the watchdog has ended; nil without devices

	mu   sync.Mutex
	over bool
}

// SuspendAll suspends devices, and freezes the filesystems on them, until Resume: all or
// none. Devices that stand on each other are taken in the order that works. A
// child resumes them after limit, or when this process dies (unless a
// container takes the child along: a starting agent calls ResumeLeft).
//
// Inactive tables that the devices have are dropped first. The child's resume puts
// those in force that were loaded by then, of some devices perhaps and not of
// others. So between SuspendAll and Resume only tables may be loaded that read the
// same as those in force, like one with an empty layer on top.
//
// fault.InUse: a device is suspended already, or somebody froze its filesystem.
// fault.NotFound: there is no such device. fault.Unavailable: writing out
// took longer than limit.
func (l *Local) SuspendAll(ctx context.Context, devices []Mapped, limit time.Duration) (*Suspension, error) {
	var now []Mapped
	for _, d := range devices {
		if slices.ContainsFunc(now, func(m Mapped) bool { return m.UUID == d.UUID }) {
			continue
		}
		m, err := l.MappedByUUID(ctx, d.UUID)
		switch {
		case err != nil:
			return nil, err
		case m == nil || m.Targets == nil:
			return nil, fault.New(fault.NotFound, "suspend device %s: there is no such device-mapper device, or it has no table", d.Name)
		case m.Suspended:
			return nil, fault.New(fault.InUse, "suspend device %s (%s): it is suspended already: \"dmsetup resume %s\" ends that if nobody works on it", m.Name, m.Path, m.Name)
		}
		if m.Inactive {
			if err := l.ClearMapped(ctx, *m); err != nil {
				return nil, err
			}
		}
		now = append(now, *m)
	}
	s := &Suspension{local: l, devices: lowerFirst(now)}
	if len(now) == 0 {
		return s, nil
	}
	l.left()
	deadline := time.Now().Add(limit)
	if err := s.watch(ctx, limit); err != nil {
		return nil, err
	}
	for i := len(s.devices) - 1; i >= 0; i-- {
		underWay, err := l.suspend(ctx, s.devices[i], true, time.Until(deadline))
		if err == nil {
			continue
		}
		undone := s.resume(s.devices[i+1:])
		if underWay == nil && undone == nil {
			s.dismiss()
		} else {
			// Something may be suspended yet: the watchdog stays and resumes it, should
			// the call that was left behind not come to it.
			s.abandon(underWay)
		}
		return nil, errors.Join(err, undone)
	}
	if !s.asked() {
		err := s.resume(s.devices)
		s.abandon(nil) // it resumes as well, or has
		return nil, errors.Join(fault.New(fault.Unavailable, "%s could not be suspended within %s: there is too much to write, or the storage is too slow", s.names(), limit), err)
	}
	return s, nil
}

func (s *Suspension) watch(ctx context.Context, limit time.Duration) error {
	control, err := guarded(ctx, &s.local.guard, "open "+dmControl, quick, func() (fd int, err error) {
		all, err := s.local.control(ctx)
		if err != nil {
			return -1, err
		}
		fd, err = unix.FcntlInt(uintptr(all), unix.F_DUPFD_CLOEXEC, 0)
		return fd, fault.Wrap(fault.Unavailable, err)
	})
	if err != nil {
		return err
	}
	var uuids []string
	for _, m := range s.devices {
		uuids = append(uuids, m.UUID)
	}
	s.dog, err = startWatchdog(control, uuids, limit)
	_ = unix.Close(control) // the child has its own
	if err != nil {
		return err
	}
	s.ended = make(chan struct{})
	go func() {
		resumed := s.dog.wait()
		s.mu.Lock()
		if !s.over && !resumed { // it was killed: nobody else would resume
			_ = s.resume(s.devices)
		}
		s.mu.Unlock()
		close(s.ended)
	}()
	return nil
}

// Holds says whether the suspension has held without a break so far.
func (s *Suspension) Holds() bool {
	select {
	case <-s.ended:
		return false
	default:
		return true
	}
}

// Renew lets the suspension last for its limit from now on. fault.Conflict: it has ended before.
func (s *Suspension) Renew() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over || s.dog == nil || !s.Holds() || !s.dog.keep() {
		return fault.New(fault.Conflict, "the suspension of %s has ended before", s.names())
	}
	return nil
}

// Resume puts the loaded tables in force and lets I/O go on, everywhere.
//
// fault.Conflict: the suspension had ended before, by its limit or by somebody
// else's hand, on some of the devices or all; what was read, flushed or loaded
// meanwhile is no one point in time. Nothing stays suspended, but a table that was
// loaded afterwards is still inactive: ClearMapped or ResumeMapped. fault.Corrupt: as of
// ResumeMapped; the watchdog has gone, too. Any other error: a
// device is still suspended, and the watchdog keeps trying until its limit.
func (s *Suspension) Resume() error {
	if s.local == nil || s.dog == nil {
		return nil
	}
	s.mu.Lock()
	if s.over {
		s.mu.Unlock()
		return fault.New(fault.Conflict, "the suspension of %s has ended before", s.names())
	}
	s.over = true
	s.mu.Unlock()
	// From the answer on it does not matter who resumes first, we or the watchdog.
	held, why := s.asked(), "its watchdog resumed it"
	ctx := context.Background() // a cut is ended, whoever gave up meanwhile
	var still []Mapped
	for _, m := range s.devices {
		r, err := s.local.dm(ctx, "ask", quick, unix.DM_DEV_STATUS, dmRequest{UUID: m.UUID})
		if err == nil && r.Flags&unix.DM_SUSPEND_FLAG == 0 {
			if held {
				held, why = false, "somebody else resumed "+m.Name
			}
			continue
		}
		still = append(still, m)
	}
	switch err := s.resume(still); {
	case errors.Is(err, fault.Corrupt): // nobody must resume it
		s.dismiss()
		return err
	case err != nil:
		_ = s.dog.close() // which makes it resume as well
		return err
	}
	s.dismiss()
	if !held {
		return fault.New(fault.Conflict, "the suspension of %s did not hold: %s", s.names(), why)
	}
	return nil
}

// asked asks the watchdog whether it has left the devices alone.
func (s *Suspension) asked() bool { return s.Holds() && s.dog.ask() }

func (s *Suspension) resume(devices []Mapped) error {
	var errs []error
	for _, m := range devices {
		errs = append(errs, s.local.ResumeMapped(context.Background(), m))
	}
	return errors.Join(errs...)
}

// dismiss sends the watchdog home. The next suspension waits until it has gone: its time may have
// been up at this very moment.
func (s *Suspension) dismiss() {
	s.mu.Lock()
	s.over = true
	s.mu.Unlock()
	s.dog.dismiss()
	l := s.local
	l.mu.Lock()
	l.leaving[s] = struct{}{}
	l.mu.Unlock()
	go func() {
		<-s.ended
		_ = s.dog.close()
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.leaving, s)
	}()
}

// left waits for the watchdogs that were dismissed.
func (l *Local) left() {
	l.mu.Lock()
	leaving := slices.Collect(maps.Keys(l.leaving))
	l.mu.Unlock()
	for _, s := range leaving {
		<-s.ended
	}
}

// abandon leaves the watchdog at work to its limit, and lets it go
// when the suspend under way, if there is one, has ended as well.
func (s *Suspension) abandon(underWay <-chan struct{}) {
	s.mu.Lock()
	s.over = true
	s.mu.Unlock()
	go func() {
		if underWay != nil {
			<-underWay
		}
		<-s.ended
		_ = s.dog.close()
	}()
}

func (s *Suspension) names() string {
	var names []string
	for _, m := range s.devices {
		names = append(names, m.Name)
	}
	return strings.Join(names, ", ")
}

// ResumeLeft resumes the devices with a UUID prefix that an agent that died
// left suspended, and returns them as they were before. Inactive tables come
// into force: see SuspendAll. Those of devices that are not suspended stay. What ResumeMapped
// refuses to resume stays, too.
func (l *Local) ResumeLeft(ctx context.Context, uuidPrefix string) ([]Mapped, error) {
	all, err := l.Mapped(ctx, uuidPrefix)
	if err != nil {
		return nil, err
	}
	var left []Mapped
	var errs []error
	for _, m := range lowerFirst(all) {
		if !m.Suspended || m.Targets == nil {
			continue
		}
		err := l.ResumeMapped(ctx, m)
		if errors.Is(err, unix.EINVAL) && l.resumesSoon(ctx, m) {
			err = nil
		}
		if err != nil {
			if !errors.Is(err, fault.NotFound) && !errors.Is(err, fault.Corrupt) {
				errs = append(errs, err)
			}
			continue
		}
		left = append(left, m)
	}
	return left, errors.Join(errs...)
}

// resumesSoon waits for a watchdog that resumes a device just now: in the middle of
// that the kernel refuses a resume by anybody else, where a layer's exceptions go over
// from one table to the next.
func (l *Local) resumesSoon(ctx context.Context, m Mapped) bool {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for range 100 {
		now, err := l.MappedByUUID(ctx, m.UUID)
		if err != nil || now == nil {
			return false
		}
		if !now.Suspended {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-tick.C:
		}
	}
	return false
}

// Package host is the only place where Quarry starts programs, mounts, and
// asks the kernel about devices and mounts. Everything that can hang runs with
// a deadline, and a child that will not die is abandoned and counted.
package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// DefaultTimeout of a command that does not say its own.
const DefaultTimeout = 2 * time.Minute

// Command is a program to run. Arguments must not hold secrets: they are
// visible in the process list; use Stdin.
type Command struct {
	Name    string
	Args    []string
	Stdin   io.Reader
	Timeout time.Duration // 0: DefaultTimeout
	// Finish: once begun it is never killed, neither by its caller nor with this process: done by half is worse
	// than not done. It has no Stdin, and a device that it holds exclusively, so that nobody works beside it.
	Finish bool
	// Begun, if not nil, is told the process ID right after the start: it is that of nobody else until Begun returns.
	Begun func(pid int)
}

// String renders the command line, for messages.
func (c Command) String() string { return strings.Join(append([]string{c.Name}, c.Args...), " ") }

// Result is what a program that was run said.
type Result struct {
	Stdout   []byte
	Stderr   []byte
	ExitCode int
}

// ExitError is a program that ended with a non-zero status.
type ExitError struct {
	Command Command
	Result  Result
}

// Error gives the command line, the status and the last line of what it said.
func (e *ExitError) Error() string {
	said := strings.TrimSpace(string(e.Result.Stderr))
	if said == "" {
		said = strings.TrimSpace(string(e.Result.Stdout))
	}
	if i := strings.LastIndexByte(said, '\n'); i >= 0 {
		said = said[i+1:]
	}
	return fmt.Sprintf("%s: exit status %d: %s", e.Command, e.Result.ExitCode, said)
}

// HangError is a program that nobody waits for any more and that has not ended. One that was killed sleeps in
// the kernel, where no signal reaches it, until its storage answers; one that is to finish does.
type HangError struct {
	Command Command
	Ended   <-chan struct{} // closed when it has ended after all
	err     error
}

// Error says it.
func (e *HangError) Error() string {
	if e.Command.Finish {
		return fmt.Sprintf("%s: %v; it goes on", e.Command, e.err)
	}
	return fmt.Sprintf("%s: %v; it was killed and still hangs: its storage does not answer", e.Command, e.err)
}

// Unwrap returns the context's error.
func (e *HangError) Unwrap() error { return e.err }

// Runner runs programs; Exec does, and unit tests bring fakes.
type Runner interface {
	// Run runs a program with LC_ALL=C to its end. A non-zero status is an
	// *ExitError beside the Result; fault.Unsupported: it is not installed;
	// fault.Deadline: it did not end in time and was killed. With a *HangError
	// below, that did not end it, and it was left behind.
	Run(ctx context.Context, c Command) (Result, error)
}

// Exec is the Runner of the real host.
type Exec struct{}

// Run implements Runner.
func (Exec) Run(ctx context.Context, c Command) (Result, error) {
	timeout := c.Timeout
	if timeout == 0 {
		timeout = DefaultTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if err := ctx.Err(); err != nil {
		return Result{}, fault.New(fault.KindOf(err), "%s: %w", c, err)
	}
	p, err := begin(c)
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return Result{}, missing(c.Name)
	case err != nil:
		return Result{}, fault.New(fault.Internal, "%s: %w", c, err)
	}
	select {
	case <-p.ended:
	case <-ctx.Done():
		if c.Finish {
			return Result{}, fault.New(fault.KindOf(ctx.Err()), "%w", &HangError{Command: c, Ended: p.ended, err: ctx.Err()})
		}
		_ = syscall.Kill(-p.process.Pid, syscall.SIGKILL) // ESRCH: it has ended just now
		patience := time.NewTimer(killPatience + outputDelay)
		defer patience.Stop()
		select {
		case <-p.ended:
		case <-patience.C: // nothing else of it may be read now
			return Result{}, fault.New(fault.KindOf(ctx.Err()), "%w", &HangError{Command: c, Ended: p.ended, err: ctx.Err()})
		}
	}
	res := Result{Stdout: p.stdout.Bytes(), Stderr: p.stderr.Bytes()}
	if p.state != nil {
		res.ExitCode = p.state.ExitCode()
	}
	switch {
	case p.err == nil && p.state.Success():
		return res, nil
	case ctx.Err() != nil:
		return res, fault.New(fault.KindOf(ctx.Err()), "%s: %w", c, ctx.Err())
	case p.state != nil && !p.state.Success():
		return res, &ExitError{Command: c, Result: res}
	}
	return res, fault.New(fault.Internal, "%s: %w", c, p.err)
}

// running is a program on its way. What is below ended is for whoever saw that closed.
type running struct {
	process *os.Process
	ended   chan struct{}

	stdout, stderr bytes.Buffer
	state          *os.ProcessState
	err            error
}

// begin starts a program.
func begin(c Command) (*running, error) {
	p := &running{ended: make(chan struct{})}
	said := newOutput
	// It dies with this process, rather than work beside its successor.
	death := syscall.SIGKILL
	if c.Finish {
		said, death = newKeptOutput, 0
	}
	stdout, err := said(&p.stdout)
	if err != nil {
		return nil, err
	}
	defer stdout.theirs.Close()
	stderr, err := said(&p.stderr)
	if err != nil {
		return nil, err
	}
	defer stderr.theirs.Close()
	var input, ours *os.File
	if c.Stdin != nil {
		if input, ours, err = os.Pipe(); err != nil {
			return nil, err
		}
		defer input.Close()
	}
	sys := &syscall.SysProcAttr{Setpgid: true, Pdeathsig: death}
	if p.process, err = startProgram(c.Name, c.Args, []*os.File{input, stdout.theirs, stderr.theirs}, sys); err != nil {
		if ours != nil {
			err = errors.Join(err, ours.Close())
		}
		return nil, err
	}
	if c.Begun != nil {
		c.Begun(p.process.Pid)
	}
	given := make(chan error, 1)
	go func() {
		var err error
		if ours != nil {
			if _, err = io.Copy(ours, c.Stdin); errors.Is(err, syscall.EPIPE) || errors.Is(err, os.ErrClosed) {
				err = nil // it ended without reading it all
			}
			_ = ours.Close()
		}
		given <- err
	}()
	go func() {
		defer close(p.ended)
		p.state, p.err = p.process.Wait()
		if ours != nil {
			_ = ours.Close() // nobody reads it any more
		}
		p.err = errors.Join(p.err, stdout.rest(), stderr.rest(), <-given)
	}()
	return p, nil
}

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
	"runtime"
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

// HangError is a program that was killed and has not ended: it sleeps in the
// kernel, where no signal reaches it, until its storage answers.
type HangError struct {
	Command Command
	Ended   <-chan struct{} // closed when it has ended after all
	err     error
}

// Error says it.
func (e *HangError) Error() string {
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
	cmd := exec.CommandContext(ctx, c.Name, c.Args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.Stdin = c.Stdin
	// It dies with this process, rather than work beside its successor.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second // for pipes that a grandchild holds open
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	ended := make(chan struct{})
	var err error
	go func() {
		defer close(ended)
		// The signal of Pdeathsig comes when the thread that started the child ends.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err = cmd.Run()
	}()
	select {
	case <-ended:
	case <-ctx.Done():
		patience := time.NewTimer(2 * cmd.WaitDelay)
		defer patience.Stop()
		select {
		case <-ended:
		case <-patience.C: // nothing else here may be read now
			return Result{}, fault.New(fault.KindOf(ctx.Err()), "%w", &HangError{Command: c, Ended: ended, err: ctx.Err()})
		}
	}
	res := Result{Stdout: stdout.Bytes(), Stderr: stderr.Bytes()}
	if cmd.ProcessState != nil {
		res.ExitCode = cmd.ProcessState.ExitCode()
	}
	var exit *exec.ExitError
	switch {
	case err == nil:
		return res, nil
	case errors.Is(err, exec.ErrNotFound):
		return res, missing(c.Name)
	case ctx.Err() != nil:
		return res, fault.New(fault.KindOf(ctx.Err()), "%s: %w", c, ctx.Err())
	case errors.As(err, &exit):
		return res, &ExitError{Command: c, Result: res}
	}
	return res, fault.New(fault.Internal, "%s: %w", c, err)
}

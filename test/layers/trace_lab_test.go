package layers

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	tracefs = "/sys/kernel/tracing"
	// tracedCalls may wait for a disk or for a device.
	tracedCalls = "fsync fdatasync syncfs ioctl fallocate openat close linkat unlinkat renameat2 mkdirat pread64 pwrite64 getdents64 statx newfstatat clone clone3 wait4 flock fcntl"
)

// traced lets the kernel record quarry's system calls while do runs, and tells what
// they took: each of a millisecond or more in order, and the sum of each kind.
func traced(t *testing.T, do func()) string {
	t.Helper()
	if err := unix.Mount("tracefs", tracefs, "tracefs", 0, ""); err != nil && err != unix.EBUSY {
		t.Fatalf("mount %s: %v", tracefs, err)
	}
	set := func(file, value string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(tracefs, file), []byte(value), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	set("buffer_size_kb", "8192")
	set("trace_clock", "mono")
	set("trace", "")
	for _, c := range strings.Fields(tracedCalls) {
		for _, side := range []string{"enter", "exit"} {
			event := "events/syscalls/sys_" + side + "_" + c
			set(event+"/filter", `comm == "quarry"`)
			set(event+"/enable", "1")
			defer set(event+"/enable", "0")
		}
	}
	set("tracing_on", "1")
	began := uptime(t)
	do()
	ended := uptime(t)
	set("tracing_on", "0")
	text, err := os.ReadFile(filepath.Join(tracefs, "trace"))
	if err != nil {
		t.Fatal(err)
	}
	set("tracing_on", "1")
	return report(string(text), began, ended)
}

// uptime is the clock that the trace has, in seconds.
func uptime(t *testing.T) float64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		t.Fatal(err)
	}
	return float64(ts.Nano()) / 1e9
}

// systemCall as the kernel records it.
type systemCall struct {
	what  string
	at    float64 // seconds
	took  time.Duration
	ended bool
}

func report(text string, began, ended float64) string {
	line := regexp.MustCompile(`^\s*.{16}-(\d+)\s+\[\d+\]\s+\S+\s+([0-9.]+): sys_(\w+)(\(.*\)| -> .*)$`)
	open := map[string]*systemCall{}
	var all []*systemCall
	for l := range strings.Lines(text) {
		f := line.FindStringSubmatch(strings.TrimRight(l, "\n"))
		if f == nil {
			continue
		}
		at, err := strconv.ParseFloat(f[2], 64)
		if err != nil {
			continue
		}
		if call := open[f[1]]; strings.HasPrefix(f[4], " -> ") {
			if call != nil {
				call.took, call.ended = time.Duration((at-call.at)*1e9), true
				delete(open, f[1])
			}
			continue
		}
		call := &systemCall{what: f[3] + named(f[3], f[4]), at: at}
		open[f[1]] = call
		all = append(all, call)
	}
	out := &strings.Builder{}
	fmt.Fprintf(out, "in all %.0f ms\n", (ended-began)*1e3)
	type sum struct {
		what string
		n    int
		took time.Duration
	}
	sums := map[string]*sum{}
	for _, c := range all {
		if !c.ended {
			continue
		}
		if c.took >= time.Millisecond {
			fmt.Fprintf(out, "%8.1f ms  %8.1f ms  %s\n", (c.at-began)*1e3, float64(c.took)/1e6, c.what)
		}
		if sums[c.what] == nil {
			sums[c.what] = &sum{what: c.what}
		}
		sums[c.what].n++
		sums[c.what].took += c.took
	}
	var list []*sum
	for _, s := range sums {
		list = append(list, s)
	}
	slices.SortFunc(list, func(a, b *sum) int { return int(b.took - a.took) })
	for _, s := range list {
		fmt.Fprintf(out, "%5d times  %8.1f ms  %s\n", s.n, float64(s.took)/1e6, s.what)
	}
	return out.String()
}

// named tells which request an ioctl is; the arguments of others are numbers that
// say nothing.
func named(call, arguments string) string {
	if call != "ioctl" {
		return ""
	}
	_, rest, _ := strings.Cut(arguments, "cmd: ")
	cmd, _, _ := strings.Cut(rest, ",")
	n, err := strconv.ParseUint(strings.TrimPrefix(cmd, "0x"), 16, 64)
	if err != nil {
		return arguments
	}
	dm := []string{"version", "remove all", "list", "create", "remove", "rename", "suspend or resume", "status", "wait", "load", "clear", "deps", "table status"}
	switch {
	case n>>8&0xff == 0xfd && int(n&0xff) < len(dm):
		return " dm " + dm[n&0xff]
	case n>>8&0xff == 'L':
		return fmt.Sprintf(" loop %#x", n&0xff)
	}
	return fmt.Sprintf(" %#x", n)
}
